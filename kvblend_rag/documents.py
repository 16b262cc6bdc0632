"""DocumentSync: keeps the store's chunks in step with a retriever's documents."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from tqdm.auto import tqdm

from kvblend_rag.background import Background
from kvblend_rag.document_use import DocumentUse, which_found
from kvblend_rag.errors import KVBlendWarning
from kvblend_rag.ingest import IngestReport
from kvblend_rag.kvblend import KVBlend


class DocumentSync:
    """Precomputes what is added, releases what is deleted, prefetches what is retrieved.

    Documents are known by id; chunks are content-addressed and stay as long as any document holds them.
    A model that can't be blended is warned of once; documents are then passed over.

    Args:
        kv: engine and store.
        background: work in a thread of its own; ``flush`` waits for it and raises its errors.
        capacity: documents that may wait; adding more blocks until there is room.
        batch: documents computed together.
        progress: show a progress bar.
    """

    def __init__(
        self,
        kv: KVBlend,
        *,
        background: bool = False,
        capacity: int = 1024,
        batch: int = 64,
        progress: bool = False,
    ) -> None:
        self.kv = kv
        self._batch, self._progress = max(batch, 1), progress
        label = "Precomputing in the background" if progress else None
        self._background = Background(max(capacity, 1), label) if background else None
        self._tally = _Tally()
        self._warned = False

    def add(self, ids: Sequence[str], texts: Sequence[str]) -> IngestReport | None:
        """Add documents, or replace those of the same ids: chunks only the old text had are let go.

        Args:
            ids: one a text; texts of one id belong together.
            texts: as they will stand in a prompt.

        Returns:
            What was done; None in background mode.

        Raises:
            StoreError: the store can't be written; in background mode ``flush`` raises it.
        """
        if self._background is None:
            return self._add(ids, texts, self._progress)
        for own_ids, own_texts in _batches(zip(ids, texts, strict=True), self._batch):
            self._background.put(partial(self._add_counted, own_ids, own_texts), len(own_ids))
        return None

    update = add

    def delete(self, ids: Sequence[str]) -> int | None:
        """Forget documents.

        Returns:
            How many chunks that nobody else holds were deleted; None in background mode.
        """
        if self._background is None:
            return self._delete(ids)
        self._background.put(partial(self._delete, tuple(ids)))
        return None

    def prefetch(self, texts: Sequence[str]) -> int | None:
        """Bring the chunks of retrieved texts into the fastest tier; does nothing before the engine has started.

        Returns:
            How many are there now; None in background mode.
        """
        if not self.kv.started:
            return 0
        if self._background is None:
            return self._prefetch(texts)
        self._background.put(partial(self._prefetch, tuple(texts)), urgent=True)
        return None

    def adopt(
        self, documents: Iterable[tuple[str, str]], *, total: int | None = None, progress: bool = True
    ) -> IngestReport:
        """Precompute an index that exists already, in batches; called again, it goes on where it stopped.

        Args:
            documents: ids and texts; read as they are needed. Texts of one id come one after the other.
            total: how many, for the progress bar.
            progress: show a progress bar.

        Returns:
            What was done, without ``keys``.
        """
        tally = _Tally()
        with tqdm(total=total, desc="Adopting documents", unit="doc", disable=not progress) as bar:
            for ids, texts in _batches(documents, self._batch):
                tally.count(self._add(ids, texts, False), len(ids))
                bar.update(len(ids))
                bar.set_postfix(computed=tally.computed)
        return tally.report()

    @property
    def pending(self) -> int:
        """Documents that still wait in background mode."""
        return 0 if self._background is None else self._background.pending

    def flush(self) -> IngestReport:
        """Wait until nothing is pending.

        Returns:
            What was done in the background since the last flush, without ``keys``.

        Raises:
            KVBlendError: the first thing that went wrong in the background since the last flush.
        """
        tally = self._tally
        try:
            if self._background is not None:
                self._background.flush()
        finally:
            self._tally = _Tally()
        return tally.report()

    def close(self) -> None:
        """Flush and end the thread; a second call does nothing."""
        try:
            self.flush()
        finally:
            if self._background is not None:
                self._background.close()

    def __enter__(self) -> DocumentSync:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _add(self, ids: Sequence[str], texts: Sequence[str], progress: bool) -> IngestReport:
        reason = self._refused()
        if reason is not None:
            return IngestReport(skipped=tuple((index, reason) for index in range(len(texts))))
        return self.kv.replace(list(texts), document_ids=list(ids), progress=progress)

    def _add_counted(self, ids: Sequence[str], texts: Sequence[str]) -> None:
        self._tally.count(self._add(ids, texts, False), len(ids))

    def _prefetch(self, texts: Sequence[str]) -> int:
        return 0 if self._refused() else self.kv.prefetch(texts)

    def _delete(self, ids: Sequence[str]) -> int:
        return 0 if self._refused() else self.kv.release(list(ids))

    def _refused(self) -> str | None:
        reason = self.kv.engine.info.refusal
        if reason is not None and not self._warned:
            self._warned = True
            model = self.kv.engine.info.model
            warnings.warn(
                f"Documents are not precomputed for {model}: {reason}. Its prompts are ordinary prefills.",
                KVBlendWarning,
                stacklevel=3,
            )
        return reason


class _Tally:
    """Sums reports; keys are left out, since an index may hold millions."""

    def __init__(self) -> None:
        self.chunks = self.computed = self.present = self.tokens = self.texts = 0
        self.seconds = 0.0
        self.skipped: list[tuple[int, str]] = []

    def count(self, report: IngestReport, texts: int) -> None:
        self.chunks += report.chunks
        self.computed += report.computed
        self.present += report.present
        self.tokens += report.tokens
        self.seconds += report.seconds
        self.skipped += [(self.texts + index, reason) for index, reason in report.skipped]
        self.texts += texts

    def report(self) -> IngestReport:
        return IngestReport(
            chunks=self.chunks,
            computed=self.computed,
            present=self.present,
            tokens=self.tokens,
            seconds=self.seconds,
            skipped=tuple(self.skipped),
        )


def _batches(documents: Iterable[tuple[str, str]], size: int) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Batches of about ``size``; texts of one id stay together, since a document is replaced as a whole."""
    batch: list[tuple[str, str]] = []
    for document in documents:
        if len(batch) >= size and document[0] != batch[-1][0]:
            yield tuple(each[0] for each in batch), tuple(each[1] for each in batch)
            batch = []
        batch.append(document)
    if batch:
        yield tuple(each[0] for each in batch), tuple(each[1] for each in batch)


__all__ = ["DocumentSync", "DocumentUse", "which_found"]
