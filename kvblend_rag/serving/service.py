"""Service: what the routes do, over one engine and its store, for every tenant."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import OrderedDict
from typing import Any

from kvblend_rag.kvblend import KVBlend
from kvblend_rag.report import BlendReport
from kvblend_rag.serving.jobs import IngestQueue
from kvblend_rag.serving.learner import Learner
from kvblend_rag.serving.schemas import (
    Deleted,
    DeleteRequest,
    Info,
    IngestRequest,
    Job,
    Members,
    Membership,
    Prefetched,
    PrefetchRequest,
    Stats,
    Tier,
)

_TENANTS_KEPT = 64

_TOLD = (
    "chunk_size",
    "selector",
    "recompute_ratio",
    "span_size",
    "score_layers",
    "coverage",
    "full_prefill_share",
    "carry",
    "enable_blending",
    "min_run",
    "ingest_context",
    "ingest_openings",
    "encoding",
    "learn_seen",
)
"""Settings that a client may know."""

_REPORT_PAUSES_S = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
"""A report reaches the workers with the step after its request's last."""


class Service:
    """One a server.

    Args:
        kv: engine and store; everything is asked of it from the event loop of the server.
        served_as: the model's name in OpenAI's API.
    """

    def __init__(self, kv: KVBlend, served_as: str = "") -> None:
        self._kv, self._served_as = kv, served_as or kv.engine.info.model
        self._tenants: OrderedDict[str, KVBlend] = OrderedDict()
        self.jobs = IngestQueue(self.handle)
        self.learner = Learner(kv.engine, self.handle, kv.config) if kv.config.learn_seen else None

    def handle(self, tenant: str) -> KVBlend:
        """The handle of a tenant's chunks; the server's own tenant where none is named."""
        tenant = tenant or self._kv.config.tenant
        if tenant not in self._tenants:
            self._tenants[tenant] = self._kv.for_tenant(tenant)
            if len(self._tenants) > _TENANTS_KEPT:
                self._tenants.popitem(last=False)
        self._tenants.move_to_end(tenant)
        return self._tenants[tenant]

    async def ingest(self, request: IngestRequest) -> Job:
        """Take documents; see ``IngestQueue.put``.

        Raises:
            ConfigError: this model can't be blended.
            QueueFull: too many documents wait.
        """
        self._kv.check_can_ingest()
        return self.jobs.put(request)

    async def delete(self, request: DeleteRequest) -> Deleted:
        """Forget documents."""
        kv = self.handle(request.tenant)
        tenant = kv.config.tenant
        ids = list(request.ids)
        for group in request.groups:
            ids += await asyncio.to_thread(kv.catalogue.members, group, tenant)
        return Deleted(chunks=await kv.arelease(list(dict.fromkeys(ids))))

    async def prefetch(self, request: PrefetchRequest) -> Prefetched:
        """Bring chunks into the fastest tier."""
        kv = self.handle(request.tenant)
        if kv.engine.info.refusal is not None:
            return Prefetched(chunks=0)
        ready = await kv.aprefetch(request.texts, document_ids=request.documents, chunks=request.chunks)
        return Prefetched(chunks=ready)

    async def membership(self, request: Membership) -> Members:
        """What documents hold, and which stand in groups."""
        kv = self.handle(request.tenant)
        tenant = kv.config.tenant

        def ask() -> Members:
            catalogue = kv.catalogue
            if request.join:
                catalogue.join(request.join, tenant)
            members = [each for group in request.groups for each in catalogue.members(group, tenant)]
            if request.group_prefix is not None:
                members += catalogue.all_members(request.group_prefix, tenant)
            own = set(catalogue.among(request.missing, kv.namespace)) if request.missing else ()
            return Members(
                chunks=catalogue.chunks_of(request.ids, tenant) if request.ids else {},
                members=list(dict.fromkeys(members)),
                missing=[key for key in request.missing if key not in own],
            )

        return await asyncio.to_thread(ask)

    async def stats(self, tenant: str = "") -> Stats:
        """What the store holds."""
        kv = self.handle(tenant)
        tenant = kv.config.tenant

        def ask() -> tuple[dict[str, int], int]:
            return kv.catalogue.stats(), sum(each.tenant == tenant for each in kv.catalogue.documents())

        counts, documents = await asyncio.to_thread(ask)
        tiers: list[dict[str, Any]] = next(iter(await self._kv.engine.call("tiers")), [])
        return Stats(
            chunks=counts["chunks"],
            tokens=counts["tokens"],
            bytes=counts["bytes"],
            documents=documents,
            tiers=[Tier(**each) for each in tiers],
            jobs=self.jobs.pending,
            learned=self.learner.learned if self.learner is not None else 0,
        )

    async def info(self) -> Info:
        """What runs here."""
        info, settings = self._kv.engine.info, self._kv.config.to_dict()
        verdict = self._kv.verdict
        return Info(
            model=info.model,
            served_as=self._served_as,
            max_model_len=info.max_model_len,
            dtype=info.dtype,
            device=info.device,
            version=info.version,
            fingerprint=info.fingerprint,
            context=list(info.context),
            header=None if info.header is None else list(info.header),
            refusal=info.refusal,
            verdict=None if verdict is None else {"status": verdict.status, "reason": verdict.reason},
            architectures=list(info.architectures),
            chat_template=self._kv.engine.template.source,
            settings={name: settings[name] for name in _TOLD},
        )

    async def report(self, request_id: str) -> dict[str, Any] | None:
        """The report of one of the last requests, by the id of its answer; None of any other."""
        for pause in _REPORT_PAUSES_S:
            await asyncio.sleep(pause)
            found = next((each for each in await self._kv.engine.call("report", request_id) if each), None)
            if found is not None:
                return dataclasses.asdict(BlendReport.from_dict(found))
        return None

    async def close(self) -> None:
        """Stop what runs in the background."""
        await self.jobs.close()
        if self.learner is not None:
            await self.learner.close()


__all__ = ["Service"]
