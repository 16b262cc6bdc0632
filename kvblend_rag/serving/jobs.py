"""IngestQueue: ingest jobs of a server, one batch at a time, so that answers do not wait for them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence

from kvblend_rag.errors import KVBlendError, StoreFull
from kvblend_rag.kvblend import KVBlend
from kvblend_rag.serving.schemas import Document, IngestRequest, Job, Skipped

logger = logging.getLogger(__name__)

_BATCH = 32
"""Documents computed together; progress is told, and a job can be cancelled, between two batches."""

_ROOM = 100_000
"""Documents that may wait."""

_REMEMBERED = 1000
_SKIPPED_TOLD = 1000


class QueueFull(KVBlendError):
    """So many documents wait that no more are taken."""


class IngestQueue:
    """Jobs in the order in which they came, in the event loop of the server.

    Args:
        handle: of a tenant.
        room: documents that may wait.
    """

    def __init__(self, handle: Callable[[str], KVBlend], room: int = _ROOM) -> None:
        self._handle, self._room = handle, room
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._batches: dict[str, tuple[list[list[Document]], bool]] = {}
        self._worker: asyncio.Task[None] | None = None

    @property
    def pending(self) -> int:
        """Jobs that wait or run."""
        return len(self._batches)

    def put(self, request: IngestRequest) -> Job:
        """Take a job.

        Raises:
            QueueFull: too many documents wait.
        """
        waiting = sum(self._jobs[each].documents - self._jobs[each].documents_done for each in self._batches)
        if waiting + len(request.documents) > self._room:
            raise QueueFull(f"{waiting:,} documents wait and {self._room:,} may: send these later.")
        job = Job(
            id=f"ingest-{uuid.uuid4().hex}", state="waiting", tenant=request.tenant, documents=len(request.documents)
        )
        self._jobs[job.id] = job
        self._batches[job.id] = _batches(request.documents), request.replace
        for old in [each for each in self._jobs if each not in self._batches][: max(len(self._jobs) - _REMEMBERED, 0)]:
            del self._jobs[old]
        if self._worker is None or self._worker.done():
            self._worker = asyncio.get_running_loop().create_task(self._work())
        return job

    def get(self, job_id: str) -> Job | None:
        """A job as it stands; None when there is none of this id, or it is long done."""
        return self._jobs.get(job_id)

    def cancel(self, job_id: str) -> Job | None:
        """Stop a job behind the batch it is at; what is stored stays."""
        job = self._jobs.get(job_id)
        if job is not None and job_id in self._batches:
            del self._batches[job_id]
            job.state = "cancelled"
        return job

    async def close(self) -> None:
        """Stop working."""
        if self._worker is not None:
            self._worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._worker

    async def _work(self) -> None:
        while self._batches:
            job_id = next(iter(self._batches))
            batches, replace = self._batches[job_id]
            job = self._jobs[job_id]
            job.state = "running"
            try:
                for batch in batches:
                    if job_id not in self._batches:
                        break
                    await self._ingest(job, batch, replace)
                else:
                    job.state = "done"
            except KVBlendError as error:
                job.state, job.error = "failed", str(error)
            except Exception as error:  # one job's accident must not end the others
                logger.exception("kvblend: ingest job %s failed.", job_id)
                job.state, job.error = "failed", f"Something unexpected went wrong ({type(error).__name__})."
            self._batches.pop(job_id, None)

    async def _ingest(self, job: Job, documents: Sequence[Document], replace: bool) -> None:
        kv = self._handle(job.tenant)
        started = time.perf_counter()
        ids = [each.id for each in documents]
        texts = [each.text if each.text is not None else each.token_ids or [] for each in documents]
        groups = [(group, each.id) for each in documents for group in each.groups]
        if groups:
            await asyncio.to_thread(kv.catalogue.join, groups, job.tenant)
        ingest = kv.areplace if replace else kv.aingest
        try:
            report = await ingest(texts, document_ids=ids, progress=False)
        except StoreFull as error:
            raise StoreFull(f"{error} {job.documents_done} of the job's documents were done by then.") from error
        job.documents_done += len(documents)
        job.chunks += report.chunks
        job.computed += report.computed
        job.present += report.present
        job.tokens += report.tokens
        job.seconds += time.perf_counter() - started
        room = max(_SKIPPED_TOLD - len(job.skipped), 0)
        job.skipped += [Skipped(id=ids[index], reason=reason) for index, reason in report.skipped[:room]]


def _batches(documents: Sequence[Document]) -> list[list[Document]]:
    """Batches of about the same size; texts of one id stay together, since a document is replaced as a whole."""
    by_id: dict[str, list[Document]] = {}
    for document in documents:
        by_id.setdefault(document.id, []).append(document)
    batches: list[list[Document]] = [[]]
    for own in by_id.values():
        if len(batches[-1]) >= _BATCH:
            batches.append([])
        batches[-1].extend(own)
    return batches


__all__ = ["IngestQueue", "QueueFull"]
