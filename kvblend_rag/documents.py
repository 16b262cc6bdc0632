"""DocumentSync: keeps the store's chunks in step with a retriever's documents."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from tqdm.auto import tqdm

from kvblend_rag.background import Background
from kvblend_rag.document_use import DocumentUse, which_found
from kvblend_rag.errors import KVBlendWarning
from kvblend_rag.ingest import IngestReport
from kvblend_rag.kvblend import KVBlend

_MARK = "\u241f"  # the picture of the unit separator: in nobody's ids


class DocumentSync:
    """Precomputes what is added, releases what is deleted, prefetches what is retrieved.

    Documents are known by id; chunks are content-addressed and stay as long as any document holds them.
    A model that can't be blended is warned of once; documents are then passed over. Neither deleting nor
    prefetching starts an engine.

    Args:
        kv: engine and store.
        namespace: tells these ids and groups from those of others that share the chunk store.
        background: work in a thread of its own; ``flush`` waits for it and raises its errors.
        capacity: documents that may wait; adding more blocks until there is room.
        batch: documents computed together.
        progress: show a progress bar.
    """

    def __init__(
        self,
        kv: KVBlend,
        *,
        namespace: str = "",
        background: bool = False,
        capacity: int = 1024,
        batch: int = 64,
        progress: bool = False,
    ) -> None:
        self.kv = kv
        self._group_space = f"{namespace}{_MARK}"
        self._space = self._group_space if namespace else ""  # without a namespace ids stay as they are
        self._batch, self._progress = max(batch, 1), progress
        label = "Precomputing in the background" if progress else None
        self._background = Background(max(capacity, 1), label) if background else None
        self._tally = _Tally()
        self._warned = False
        self._doomed: dict[str, None] = {}
        self._lock = threading.RLock()

    def add(
        self, ids: Sequence[str], texts: Sequence[str], *, groups: Sequence[str] | None = None
    ) -> IngestReport | None:
        """Add documents, or replace those of the same ids: chunks only the old text had are let go.

        Args:
            ids: one a text; texts of one id belong together.
            texts: as they will stand in a prompt.
            groups: one a text: what ``delete`` may name to delete several documents at once, such as their source.

        Returns:
            What was done; None in background mode.

        Raises:
            StoreError: the store can't be written; in background mode ``flush`` raises it.
        """
        own = self._own(ids)
        members = self._members(own, groups)
        with self._lock:
            for each in own:
                self._doomed.pop(each, None)
        if self._background is None:
            report = self._add(own, texts, members, self._progress)
        else:
            report = None
            self._join(members)  # at once: a deletion may name the group before the thread comes to it
            joined: dict[str, set[tuple[str, str]]] = {}
            for pair in members:
                joined.setdefault(pair[1], set()).add(pair)
            for batch_ids, batch_texts in _batches(zip(own, texts, strict=True), self._batch):
                part = sorted(set().union(*(joined.get(each, ()) for each in batch_ids)))
                self._background.put(partial(self._add_counted, batch_ids, batch_texts, part), len(batch_ids))
        self._delete_doomed()
        return report

    update = add

    def delete(self, ids: Sequence[str] = (), *, groups: Sequence[str] = (), later: bool = False) -> int | None:
        """Forget documents.

        Args:
            ids: of single documents.
            groups: of which all documents are forgotten.
            later: with the next ``add`` (after it, so that what it adds anew is not computed again), ``prefetch``,
                ``flush`` or ``close``.

        Returns:
            How many chunks that nobody else holds were deleted; None in background mode and when it is for later.
        """
        tenant = self.kv.config.tenant
        doomed = self._own(ids)
        for group in groups:
            doomed += self.kv.catalogue.members(self._group_space + group, tenant)
        if not later:
            return self._delete(doomed)
        with self._lock:
            self._doomed.update(dict.fromkeys(doomed))
        return None

    def clear(self) -> int | None:
        """Forget every document of this namespace that was added with a group.

        Returns:
            As ``delete``.
        """
        return self._delete(self.kv.catalogue.all_members(self._group_space, self.kv.config.tenant))

    def prefetch(self, texts: Sequence[str] = (), *, ids: Sequence[str] = ()) -> int | None:
        """Bring the chunks of retrieved documents into the fastest tier; does nothing before the engine has started.

        Args:
            texts: as they were added.
            ids: of documents; with ``texts``, one each: only texts of unknown ids are looked at then.

        Returns:
            How many are there now; None in background mode.
        """
        self._delete_doomed()
        if not self.kv.started:
            return 0
        own = self._own(ids)
        if self._background is None:
            return self._prefetch(texts, own)
        self._background.put(partial(self._prefetch, tuple(texts), own), urgent=True)
        return None

    def adopt(
        self,
        documents: Iterable[tuple[str, str]],
        *,
        group_of: Callable[[str], str] | None = None,
        total: int | None = None,
        progress: bool = True,
    ) -> IngestReport:
        """Precompute an index that exists already, in batches; called again, it goes on where it stopped.

        Args:
            documents: ids and texts; read as they are needed. Texts of one id come one after the other.
            group_of: the group of an id that was read.
            total: how many, for the progress bar.
            progress: show a progress bar.

        Returns:
            What was done, without ``keys``.
        """
        tally = _Tally()
        with tqdm(total=total, desc="Adopting documents", unit="doc", disable=not progress) as bar:
            for ids, texts in _batches(documents, self._batch):
                own = self._own(ids)
                members = self._members(own, None if group_of is None else [group_of(each) for each in ids])
                tally.count(self._add(own, texts, members, False), len(ids))
                bar.update(len(ids))
                bar.set_postfix(computed=tally.computed)
        return tally.report()

    @property
    def pending(self) -> int:
        """Documents that still wait in background mode."""
        return 0 if self._background is None else self._background.pending

    def flush(self) -> IngestReport:
        """Do what was put off, and wait until nothing is pending.

        Returns:
            What was done in the background since the last flush, without ``keys``.

        Raises:
            KVBlendError: the first thing that went wrong in the background since the last flush.
        """
        self._delete_doomed()
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

    def _own(self, ids: Iterable[str]) -> list[str]:
        return [self._space + each for each in ids]

    def _members(self, own: Sequence[str], groups: Sequence[str] | None) -> list[tuple[str, str]]:
        return [(self._group_space + group, each) for group, each in zip(groups or (), own, strict=groups is not None)]

    def _join(self, members: Sequence[tuple[str, str]]) -> None:
        if members:
            self.kv.catalogue.join(members, self.kv.config.tenant)

    def _add(
        self, own: Sequence[str], texts: Sequence[str], members: Sequence[tuple[str, str]], progress: bool
    ) -> IngestReport:
        reason = self._refused()
        if reason is not None:
            return IngestReport(skipped=tuple((index, reason) for index in range(len(texts))))
        self._join(members)
        return self.kv.replace(list(texts), document_ids=list(own), progress=progress)

    def _add_counted(self, own: Sequence[str], texts: Sequence[str], members: Sequence[tuple[str, str]]) -> None:
        self._tally.count(self._add(own, texts, members, False), len(own))

    def _prefetch(self, texts: Sequence[str], own: Sequence[str]) -> int:
        if self._refused():
            return 0
        if texts and own:
            known = self.kv.catalogue.chunks_of(own, self.kv.config.tenant)
            texts = [text for text, each in zip(texts, own, strict=True) if each not in known]
        return self.kv.prefetch(texts, document_ids=own)

    def _delete(self, own: Sequence[str]) -> int | None:
        if self._background is None:
            return self.kv.release(own)
        self._background.put(partial(self.kv.release, tuple(own)))
        return None

    def _delete_doomed(self) -> None:
        with self._lock:
            doomed, self._doomed = list(self._doomed), {}
        if doomed:
            self._delete(doomed)

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
