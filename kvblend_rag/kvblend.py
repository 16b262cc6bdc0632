"""KVBlend: the one handle on engine and store, shared by LLM and the framework integrations."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import importlib.util
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from tqdm.auto import tqdm

from kvblend_rag.blend.chunk import TokenIds, chunk_key, namespace
from kvblend_rag.calibration.risk import DEFAULT_RISK
from kvblend_rag.calibration.verdict import Verdict, find_verdict
from kvblend_rag.config import BlendConfig
from kvblend_rag.engine import Engine, Prompt
from kvblend_rag.errors import VLLM_MISSING, ConfigError, EngineUnavailable
from kvblend_rag.guard import Guard
from kvblend_rag.ingest import Documents, Ingester, IngestReport, Text, raise_if_store_failed
from kvblend_rag.output import RequestOutput
from kvblend_rag.selectors import get_selector
from kvblend_rag.store import Catalogue, open_catalogue, open_store


class KVBlend:
    """An engine that starts on first use, and the chunk store beside it.

    Args:
        config: every setting, the model's name among them.
        engine: one that runs already; None starts vLLM when it is first needed, or connects to ``base_url``.
        api_key: of the server at ``base_url``; empty: ``KVBLEND_API_KEY``, or ``OPENAI_API_KEY``.
    """

    def __init__(self, config: BlendConfig, engine: Engine | None = None, *, api_key: str = "") -> None:
        self.config = config
        self._api_key = api_key
        self._engine = engine
        self._catalogue: Catalogue | None = None
        self._ingester: Ingester | None = None
        self._guard: Guard | None = None
        self._lock = threading.RLock()
        self._closed = False
        _open_handles.add(self)

    @classmethod
    def from_config(cls, path: str | Path | None = None, *, api_key: str = "", **settings: Any) -> KVBlend:
        """From a YAML file (or ``KVBLEND_CONFIG_FILE``, variables and defaults) and keyword arguments."""
        return cls(BlendConfig.load(path, **settings), api_key=api_key)

    @property
    def engine(self) -> Engine:
        """The engine, started when it is first asked for.

        Raises:
            EngineUnavailable: vLLM is not installed, of an unsupported version, or did not start.
            ModelNotFound: there is no such model.
        """
        with self._lock:
            if self._closed:
                raise EngineUnavailable("This engine was closed: make a new one.")
            if self._engine is None:
                served = self.config.base_url
                self._engine = _connect(self.config, self._api_key) if served else _launch(self.config)
            return self._engine

    def for_tenant(self, tenant: str) -> KVBlend:
        """A handle on the same engine and store for another tenant's chunks.

        Closing either closes the engine for both.
        """
        if tenant == self.config.tenant:
            return self
        other = KVBlend(self.config.replace(tenant=tenant), self.engine)
        other._catalogue = self.catalogue
        return other

    @property
    def started(self) -> bool:
        """Whether the engine is there, so that asking for it does not take long."""
        return self._engine is not None and not self._closed

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    @property
    def catalogue(self) -> Catalogue:
        """Which chunks are stored and which documents hold them; of a server, what ``Documents.catalogue`` tells."""
        theirs = self._documents
        if theirs is not None:
            return cast(Catalogue, theirs.catalogue)
        with self._lock:
            if self._catalogue is None:
                self._catalogue = open_catalogue(self.config)
            return self._catalogue

    @cached_property
    def verdict(self) -> Verdict | None:
        """What ``kvblend calibrate`` found out about this model and ingest context, as the engine read it at start.

        Raises:
            ConfigError: the verdict's file can't be read.
        """
        info = self.engine.info
        if self.config.base_url:
            return None  # the server heeds its own
        return find_verdict(self.config, info.fingerprint, info.context)

    def stream(
        self,
        prompt: Prompt,
        sampling_params: Any = None,
        *,
        blend: Mapping[str, Any] | None = None,
        whole: bool = False,
        **extra: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one prompt as they come; iterate in any event loop, leave to abort.

        With ``max_risk`` below 1 nothing is shown before the blended answer's risk is known, and a risky one is
        computed in full instead, or marked (``on_risk``).

        Args:
            prompt: text, token ids, or a vLLM prompt dictionary.
            sampling_params: the engine's; None for its defaults.
            blend: this request's blending; the names of ``BlendConfig.for_request``.
            whole: the caller waits for the last output, so that with ``max_risk`` the whole answer may be judged.
            extra: passed on to the engine.

        Raises:
            ConfigError: a value that can't be used.
        """
        options = {"tenant": self.config.tenant, **(blend or {})}
        own = self.config.for_request(options)
        get_selector(own.selector)
        engine = self.engine
        if own.max_risk >= 1 or not own.enable_blending:
            return engine.generate(prompt, sampling_params, options=options, **extra)
        with self._lock:
            if self._guard is None:
                verdict = self.verdict
                self._guard = Guard(engine, DEFAULT_RISK if verdict is None else verdict.risk)
        return self._guard.stream(prompt, sampling_params, options, own, whole=whole, **extra)

    def ingest(
        self,
        texts: str | Sequence[Text],
        *,
        document_ids: Sequence[str] | None = None,
        progress: bool = True,
        alone: bool = False,
    ) -> IngestReport:
        """Precompute and store the KV of texts; what is stored already is not computed again.

        When this returns, everything reported as computed is on disk and survives a crash. Interrupted,
        it goes on where it stopped when called again.

        Args:
            texts: each a chunk, as text or as token ids; those longer than ``chunk_size`` tokens are split at
                natural boundaries.
            document_ids: one a text, for ``release``; equal ones belong together.
            progress: show a progress bar.
            alone: without companions, where ``ingest_context`` is ``similar``; a server's own matter with ``base_url``.

        Raises:
            StoreError: the store can't be written (StoreFull: no space is left).
        """
        return self.engine.run(self.aingest(texts, document_ids=document_ids, progress=progress, alone=alone))

    async def aingest(
        self,
        texts: str | Sequence[Text],
        *,
        document_ids: Sequence[str] | None = None,
        progress: bool = True,
        alone: bool = False,
    ) -> IngestReport:
        """``ingest`` for callers in an event loop."""
        several: list[Text] = [texts] if isinstance(texts, str) else list(texts)
        if document_ids is not None and len(document_ids) != len(several):
            raise ConfigError(f"{len(several)} texts came with {len(document_ids)} document ids: give one each.")
        theirs = self._documents
        if theirs is not None:
            self.check_can_ingest()
            return await theirs.ingest(several, document_ids, self.config.tenant, replace=False, progress=progress)
        started = time.perf_counter()
        ingester = self._ready_ingester()
        with tqdm(total=None, desc="Precomputing KV", unit="chunk", disable=not progress) as bar:
            pieces, wanted, failed = await ingester.ingest(several, document_ids, bar, alone=alone)
        raise_if_store_failed(failed)
        return IngestReport(
            chunks=len({key for piece in pieces for key in piece.keys}),
            computed=len(wanted),
            present=len({key for piece in pieces for key in piece.keys} - wanted.keys()),
            tokens=sum(map(len, wanted.values())),
            seconds=time.perf_counter() - started,
            keys=tuple(tuple(piece.keys) for piece in pieces),
            skipped=tuple((i, piece.reason) for i, piece in enumerate(pieces) if piece.reason is not None),
        )

    def replace(self, texts: Sequence[Text], *, document_ids: Sequence[str], progress: bool = True) -> IngestReport:
        """``ingest`` for edited documents: chunks that only their old texts had are deleted."""
        return self.engine.run(self.areplace(texts, document_ids=document_ids, progress=progress))

    async def areplace(
        self, texts: Sequence[Text], *, document_ids: Sequence[str], progress: bool = True
    ) -> IngestReport:
        """``replace`` for callers in an event loop."""
        theirs = self._documents
        if theirs is not None:
            self.check_can_ingest()
            return await theirs.ingest(texts, document_ids, self.config.tenant, replace=True, progress=progress)
        report = await self.aingest(texts, document_ids=document_ids, progress=progress)
        kept: dict[str, list[str]] = {}
        for document_id, keys in zip(document_ids, report.keys, strict=True):
            kept.setdefault(document_id, []).extend(keys)
        free = self.catalogue.settle(kept, (), self.config.tenant)
        if free:
            await self.engine.call("forget", free)
        return report

    def check_can_ingest(self) -> None:
        """Raise if chunks can't be precomputed; starts the engine.

        Raises:
            ConfigError: this model can't be blended.
        """
        info = self.engine.info
        if info.refusal is not None:
            raise ConfigError(
                f"Chunks can't be precomputed for {info.model}: {info.refusal}. "
                "Prompts are answered by an ordinary prefill."
            )

    @property
    def namespace(self) -> str:
        """What model, ingest context and tenant make of a chunk's key; starts the engine."""
        info = self.engine.info
        return namespace(info.fingerprint, info.context, self.config.tenant)

    def cut(self, text: Text) -> list[tuple[str, TokenIds]]:
        """A text's chunks as ``ingest`` makes them: key and token ids.

        Raises:
            ChunkRejected: the text is empty, or too short to be found again.
        """
        ingester = self._ready_ingester()
        return [(chunk_key(ingester.namespace, chunk), chunk) for chunk in ingester.cut(text)]

    def keys_of(self, chunk: TokenIds) -> list[str]:
        """The keys under which a chunk is stored, the one of ``cut`` first; several with ``ingest_openings``."""
        return self._ready_ingester().keys_of(chunk)

    def release(self, document_ids: Sequence[str]) -> int:
        """Documents no longer need their chunks; those that nobody else holds are deleted.

        No engine is started for it.

        Returns:
            How many chunks were deleted.
        """
        if self.started or self.config.base_url:
            return self.engine.run(self.arelease(document_ids))
        return len(self._delete_unheld(self._let_go(document_ids)))

    async def arelease(self, document_ids: Sequence[str]) -> int:
        """``release`` for callers in an event loop."""
        theirs = self._documents
        if theirs is not None:
            return await theirs.release(document_ids, self.config.tenant)
        free = self._let_go(document_ids)
        if not self.started:
            return len(await asyncio.to_thread(self._delete_unheld, free))
        # The workers do it: their memory holds these chunks too.
        return max((len(gone) for gone in await self.engine.call("forget", free)), default=0) if free else 0

    def _let_go(self, document_ids: Sequence[str]) -> list[str]:
        return self.catalogue.settle({}, document_ids, self.config.tenant)

    def _delete_unheld(self, keys: list[str]) -> list[str]:
        if not keys:
            return []
        with contextlib.closing(open_store(self.config)) as store:
            return store.delete_unheld(keys)

    def prefetch(
        self, texts: Sequence[Text] = (), *, document_ids: Sequence[str] = (), chunks: Sequence[str] = ()
    ) -> int:
        """Bring chunks into the fastest tier before a prompt asks for them.

        Args:
            texts: as they were ingested; those that never were are passed over.
            document_ids: documents whose chunks are wanted; unknown ones are passed over.
            chunks: keys of chunks; those that are not this tenant's are passed over.

        Returns:
            How many are there now.
        """
        return self.engine.run(self.aprefetch(texts, document_ids=document_ids, chunks=chunks))

    async def aprefetch(
        self, texts: Sequence[Text] = (), *, document_ids: Sequence[str] = (), chunks: Sequence[str] = ()
    ) -> int:
        """``prefetch`` for callers in an event loop."""
        theirs = self._documents
        if theirs is not None:
            return await theirs.prefetch(texts, document_ids, chunks, self.config.tenant)
        held = self.catalogue.chunks_of(document_ids, self.config.tenant) if document_ids else {}
        keys = [key for own in held.values() for key in own]
        keys += [key for text in texts for key in self._ready_ingester().keys(text)]
        if chunks:
            keys += self.catalogue.among(chunks, self.namespace)
        return max(await self.engine.call("prefetch", keys), default=0) if keys else 0

    def close(self) -> None:
        """Stop the engine and close the store; a second call does nothing."""
        with self._lock:
            self._closed = True
            if self._engine is not None:
                self._engine.close()
            if self._catalogue is not None:
                self._catalogue.close()
                self._catalogue = None

    def __enter__(self) -> KVBlend:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def _cutting(self) -> BlendConfig:
        """The configuration by which texts are cut: a server's where it does so."""
        size = getattr(self.engine, "settings", {}).get("chunk_size")
        return self.config if size is None else self.config.replace(chunk_size=int(size))

    @property
    def _documents(self) -> Documents | None:
        """The store that is the engine's own business; nothing but a connection is started by asking."""
        return self.engine.documents if self.started or self.config.base_url else None

    def _ready_ingester(self) -> Ingester:
        self.check_can_ingest()
        engine = self.engine
        with self._lock:
            if self._ingester is None:
                self._ingester = Ingester(engine, self.catalogue, self._cutting)
            return self._ingester


def _connect(config: BlendConfig, api_key: str) -> Engine:
    if config.engine_args:
        raise ConfigError("engine_args are for an engine that is started here, and base_url names a server.")
    from kvblend_rag.client.engine import HTTPEngine

    return HTTPEngine(config.base_url, api_key, config.model)


def _launch(config: BlendConfig) -> Engine:
    if importlib.util.find_spec("vllm") is None:
        raise EngineUnavailable(VLLM_MISSING)
    from kvblend_rag.vllm_plugin.engine import VLLMEngine

    return VLLMEngine.launch(config.model, config, **config.engine_args)


_open_handles: weakref.WeakSet[KVBlend] = weakref.WeakSet()


@atexit.register
def close_all() -> None:
    """Close every handle that is still open; runs at exit by itself."""
    for handle in list(_open_handles):
        handle.close()


__all__ = ["KVBlend", "close_all"]
