"""DocumentSync: keeps the store's chunks in step with a retriever's documents."""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from tqdm.auto import tqdm

from kvblend_rag.document_use import DocumentUse, which_found
from kvblend_rag.errors import KVBlendWarning
from kvblend_rag.ingest import IngestReport
from kvblend_rag.kvblend import KVBlend


class _Task(NamedTuple):
    kind: Literal["add", "delete", "prefetch"]
    ids: tuple[str, ...]
    texts: tuple[str, ...]


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
        self._capacity, self._batch, self._progress = max(capacity, 1), max(batch, 1), progress
        self._background = background
        self._warned = False
        self._waiting: deque[_Task] = deque()
        self._pending = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._ending = False
        self._done = _Tally()
        self._error: BaseException | None = None
        self._bar: Any = None

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
        if not self._background:
            return self._add(ids, texts, self._progress)
        for part in _parts(ids, texts, self._batch):
            self._enqueue(_Task("add", *part))
        return None

    update = add

    def delete(self, ids: Sequence[str]) -> int | None:
        """Forget documents.

        Returns:
            How many chunks that nobody else holds were deleted; None in background mode.
        """
        if self._background:
            self._enqueue(_Task("delete", tuple(ids), ()))
            return None
        return self._delete(ids)

    def prefetch(self, texts: Sequence[str]) -> int | None:
        """Bring the chunks of retrieved texts into the fastest tier; does nothing before the engine has started.

        Returns:
            How many are there now; None in background mode.
        """
        if not self.kv.started:
            return 0
        if self._background:
            self._enqueue(_Task("prefetch", (), tuple(texts)), urgent=True)
            return None
        return 0 if self._refused() else self.kv.prefetch(texts)

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
        return self._pending

    def flush(self) -> IngestReport:
        """Wait until nothing is pending.

        Returns:
            What was done in the background since the last flush, without ``keys``.

        Raises:
            KVBlendError: the first thing that went wrong in the background since the last flush.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._pending)
            error, self._error = self._error, None
            tally, self._done = self._done, _Tally()
        if error is not None:
            raise error
        return tally.report()

    def close(self) -> None:
        """Flush and end the thread; a second call does nothing."""
        try:
            self.flush()
        finally:
            with self._changed:
                self._ending = True
                self._changed.notify_all()
            if self._thread is not None:
                self._thread.join()
                self._thread = None

    def __enter__(self) -> DocumentSync:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _add(self, ids: Sequence[str], texts: Sequence[str], progress: bool) -> IngestReport:
        reason = self._refused()
        if reason is not None:
            return IngestReport(skipped=tuple((index, reason) for index in range(len(texts))))
        return self.kv.replace(list(texts), document_ids=list(ids), progress=progress)

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

    def _enqueue(self, task: _Task, urgent: bool = False) -> None:
        size = _size(task)
        with self._changed:
            # A task larger than the whole queue is let in alone; a prefetch that waits is of no use.
            self._changed.wait_for(lambda: urgent or not self._pending or self._pending + size <= self._capacity)
            (self._waiting.appendleft if urgent else self._waiting.append)(task)
            self._pending += size
            self._show(more=size)
            if self._thread is None:
                self._ending = False
                self._thread = threading.Thread(target=self._work, name="kvblend-documents", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ending)
                if not self._waiting:
                    return
                task = self._waiting.popleft()
            try:
                report = self._do(task)
            except BaseException as error:
                with self._changed:
                    self._error = self._error or error
            else:
                self._done.count(report, len(task.texts))
            with self._changed:
                self._pending -= _size(task)
                self._show(done=_size(task))
                self._changed.notify_all()

    def _do(self, task: _Task) -> IngestReport:
        if task.kind == "add":
            return self._add(task.ids, task.texts, False)
        if task.kind == "delete":
            self._delete(task.ids)
        elif not self._refused():
            self.kv.prefetch(task.texts)
        return IngestReport()

    def _show(self, more: int = 0, done: int = 0) -> None:
        if not self._progress:
            return
        if self._bar is None:
            self._bar = tqdm(total=0, desc="Precomputing in the background", unit="doc")
        self._bar.total += more
        self._bar.update(done)
        if not self._pending:
            self._bar.close()
            self._bar = None


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


def _size(task: _Task) -> int:
    return max(len(task.ids), 1)


def _parts(
    ids: Sequence[str], texts: Sequence[str], size: int
) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    return _batches(zip(ids, texts, strict=True), size)


def _batches(
    documents: Iterable[tuple[str, str]], size: int
) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
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
