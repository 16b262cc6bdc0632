"""The worker's side: blends and saves what the scheduler planned, on this rank's heads."""

from __future__ import annotations

import contextlib
import logging
import math
import re
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.tokenizers import cached_tokenizer_from_config

from kvblend_rag.blend.context import ingest_context, own_documents
from kvblend_rag.blend.cost import Pace
from kvblend_rag.calibration.risk import Signals
from kvblend_rag.calibration.verdict import preferred_context
from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import KVBlendError
from kvblend_rag.report import TierLoad
from kvblend_rag.store import StoredChunk, TieredStore, open_catalogue, open_store
from kvblend_rag.store.encoding import Encoding
from kvblend_rag.store.page_locking import lock_pages_by_threads
from kvblend_rag.vllm_plugin import compat
from kvblend_rag.vllm_plugin.metadata import (
    BlendJob,
    Closing,
    Handshake,
    Outcome,
    SaveJob,
    SeenPrompt,
    StepOutcome,
    StepPlan,
)
from kvblend_rag.vllm_plugin.request import recipe_of
from kvblend_rag.vllm_plugin.worker.audit import Audit
from kvblend_rag.vllm_plugin.worker.blender import Blender
from kvblend_rag.vllm_plugin.worker.forward import ScatteredForward
from kvblend_rag.vllm_plugin.worker.hot_chunks import HotChunks
from kvblend_rag.vllm_plugin.worker.identity import fingerprint
from kvblend_rag.vllm_plugin.worker.loader import DirectLoader, Loader
from kvblend_rag.vllm_plugin.worker.paged_kv import PagedKV
from kvblend_rag.vllm_plugin.worker.ranks import Ranks
from kvblend_rag.vllm_plugin.worker.rehearsal import Rehearsal, Shelf
from kvblend_rag.vllm_plugin.worker.scout import Scout
from kvblend_rag.vllm_plugin.worker.stopwatch import Stopwatch
from kvblend_rag.vllm_plugin.worker.survey import Refused, check_shift, refuse_options, survey_layers
from kvblend_rag.vllm_plugin.worker.writer import Writer

logger = logging.getLogger(__name__)

T = TypeVar("T")

_ACCOUNTS_KEPT = 512
_REPORTS_KEPT = 4096
_SEEN_KEPT = 256

_GIB = 1 << 30


class WorkerSide:
    """Lives in a worker's process; never learns of queues or of the catalogue's contents."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._vllm_config = vllm_config
        self._config = _config(vllm_config)
        self._runner: Any = None
        self._begun: StepPlan | None = None
        self._handshake: Handshake | None = None
        self._outcomes: dict[str, Outcome] = {}
        self._accounts: OrderedDict[str, dict[str, float | None]] = OrderedDict()
        self._reports: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._seen: deque[SeenPrompt] = deque(maxlen=_SEEN_KEPT)
        self._last_busy = time.monotonic()
        self._paged: PagedKV
        self._blender: Blender
        self._audit: Audit | None = None
        self._hot: HotChunks | None = None
        self._store: TieredStore | None = None
        self._writer: Writer | None = None
        self._scout: Scout | None = None
        self._stopwatch = Stopwatch(torch.device("cpu"))
        self._trace: torch.profiler.profile | None = None

    def bind(self, runner: Any) -> None:
        """Take vLLM's model runner, once its KV cache is there."""
        self._runner = runner

    def handshake(self) -> Handshake:
        """Survey the model, once; called when it is warmed up and before the first request."""
        if self._handshake is None:
            self._handshake = self._survey()
        return self._handshake

    @torch.inference_mode()
    def begin(self, plan: StepPlan) -> None:
        """Do what a step's plan asks for before vLLM's own forward; a second call with the same plan does nothing."""
        if plan is self._begun:
            return
        self._begun = plan
        self.note(plan.closing)
        self.meet_again(plan.met_again)
        self.blend(plan.blends)
        self.fetch(plan.fetch)

    def blend(self, jobs: Iterable[BlendJob]) -> None:
        """Blend requests, in the order in which they were admitted."""
        for job in jobs:
            with self._stopwatch.blend(job.request_id):
                outcome = self._outcomes[job.request_id] = self._blender.blend(job)
            if outcome.fallback is None:
                self._keep_account(job.request_id, outcome.signals)

    def meet_again(self, requests: Mapping[str, Signals]) -> None:
        """Requests that run on an earlier blend's KV: what that showed."""
        for request_id, signals in requests.items():
            self._keep_account(request_id, signals)

    def note(self, closing: Closing) -> None:
        """Keep what the front end may ask for: the last reports, and prompts to learn from."""
        for report in closing.reports:
            self._reports[report["request_id"]] = report
            if len(self._reports) > _REPORTS_KEPT:
                self._reports.popitem(last=False)
        self._seen.extend(closing.seen)
        if closing.busy:
            self._last_busy = time.monotonic()

    @torch.inference_mode()
    def save(self, jobs: Iterable[SaveJob]) -> None:
        """Copy chunks out of the paged cache and hand them to the writer."""
        for job in jobs:
            paged, writer = self._paged, self._writer
            assert writer is not None
            writer.wait_for_room(math.prod(paged.chunk_shape(job.stop - job.start)) * paged.dtype.itemsize)
            kv = paged.read_chunk(job.block_ids, job.start, job.stop)
            writer.write(StoredChunk(job.key, job.namespace, job.token_ids, kv))

    def fetch(self, keys: Sequence[str]) -> None:
        """Bring chunks into host memory beside the engine's work."""
        if keys and self._scout is not None:
            self._scout.fetch(keys)

    def take_outcomes(self) -> StepOutcome | None:
        """What was blended and measured since the last call."""
        outcomes, self._outcomes = self._outcomes, {}
        outcome = StepOutcome(outcomes)
        if self._store is not None:
            outcome.in_memory = self._store.take_changes()
        if self._scout is not None:
            outcome.loads = self._scout.take_loads()
        outcome.step_seconds, outcome.blend_seconds = self._stopwatch.take()
        return outcome if any(vars(outcome).values()) else None

    def step(self, number: int) -> contextlib.AbstractContextManager[None]:
        """Around one of vLLM's steps, which is timed."""
        return self._stopwatch.step(number)

    # Called from outside through KVBlendWorker.kvblend

    def describe(self) -> dict[str, Any]:
        """Fingerprint, ingest context, header, permit, and why the model is refused, if it is."""
        handshake = self.handshake()
        return {
            "fingerprint": handshake.fingerprint,
            "context": list(handshake.context),
            "header": None if handshake.header is None else list(handshake.header),
            "permit": handshake.permit,
            "refusal": handshake.refusal,
            "rank": handshake.rank,
        }

    def flush(self) -> dict[str, str]:
        """Wait until every saved chunk is durable; reasons of those that failed, by key."""
        return {} if self._writer is None else self._writer.flush()

    def prefetch(self, keys: list[str]) -> int:
        """Bring chunks into the fastest tier; how many are there now."""
        return 0 if self._store is None else self._store.prefetch(keys)

    def forget(self, keys: list[str]) -> list[str]:
        """Delete those chunks that no document holds, from every tier."""
        gone = [] if self._store is None else self._store.delete_unheld(keys)
        if self._hot is not None:
            self._hot.forget(gone)
        return gone

    def account(self, request_id: str) -> dict[str, float | None] | None:
        """What is known of a request on blended KV before its report is there; None of any other, or a late one.

        Args:
            request_id: as given to vLLM, which makes it its own by a suffix (and a number in front, with n > 1).
        """
        return _of_request(self._accounts, request_id)

    def report(self, request_id: str) -> dict[str, Any] | None:
        """The report of one of the last requests that ended; None of any other.

        Args:
            request_id: as ``account`` takes it, or as an answer's ``id`` names it.
        """
        return _of_request(self._reports, request_id)

    def take_seen(self, most: int) -> dict[str, Any]:
        """Prompts to learn chunks from, each told once, and for how many seconds the engine has been idle."""
        prompts = [self._seen.popleft() for _ in range(min(most, len(self._seen)))]
        return {
            "idle": time.monotonic() - self._last_busy,
            "prompts": [
                {"tenant": each.tenant, "token_ids": each.token_ids.tolist(), "known": [list(a) for a in each.known]}
                for each in prompts
            ],
        }

    def tiers(self) -> list[dict[str, Any]]:
        """Name and size of each tier of this rank, the fastest first."""
        return [] if self._store is None else [{"tier": t.name, "bytes": t.nbytes()} for t in self._store.tiers]

    def audit(self, key: str, token_ids: Sequence[int]) -> dict[str, Any]:
        """How far a stored chunk is from what the model computes; see ``Audit.chunk``. For an idle engine alone."""
        if self._audit is None:
            return {"fault": "this model can't be blended"}
        try:
            return self._audit.chunk(key, token_ids)
        except KVBlendError as error:
            return {"fault": str(error)}

    def start_trace(self) -> None:
        """Record what this worker does, for a timeline."""
        self._trace = torch.profiler.profile()
        self._trace.start()

    def stop_trace(self, path: str) -> None:
        """Stop recording and write a Chrome trace."""
        assert self._trace is not None
        self._trace.stop()
        self._trace.export_chrome_trace(path)
        self._trace = None

    def close(self) -> None:
        """Finish writing and close the store; a second call does nothing."""
        if self._scout is not None:
            self._scout.close()
        if self._writer is not None:
            self._writer.close()
        if self._store is not None:
            self._store.close()

    def _keep_account(self, request_id: str, signals: Signals) -> None:
        self._accounts[request_id] = {"uncovered": signals.uncovered_mass, "moved": signals.moved_mass}
        if len(self._accounts) > _ACCOUNTS_KEPT:
            self._accounts.popitem(last=False)

    def _survey(self) -> Handshake:
        refusal, identity, context, permit = None, "", [], ""
        header: tuple[int, ...] | None = None
        pace: Pace | None = None
        loads: list[TierLoad] = []
        ranks = Ranks()
        try:
            unsupported = compat.unsupported_version()
            if unsupported is not None:
                raise Refused(unsupported)
            if self._runner is None:
                raise Refused("start vLLM with --worker-cls kvblend_rag.vllm_plugin.worker_cls.KVBlendWorker")
            refuse_options(self._vllm_config)
            if self._runner.device.type == "cuda":
                # For tables of a prompt's length, threads cost ten times what they save; vLLM's executor of several
                # GPUs does the same.
                torch.set_num_threads(1)
                lock_pages_by_threads()
            layers = survey_layers(self._runner)
            self._paged = PagedKV(layers, int(self._vllm_config.cache_config.block_size))
            forward = ScatteredForward(self._runner, self._paged)
            check_shift(layers, self._paged, forward, self._vllm_config)
            identity = fingerprint(self._vllm_config)
            kind = preferred_context(self._config, identity)
            openings = self._config.ingest_openings and kind != "header"
            if kind != "none" or openings:
                tokenizer = cached_tokenizer_from_config(self._vllm_config.model_config)
                documents = own_documents(self._config.ingest_documents)
                context = ingest_context(kind, tokenizer, self._config.system_prompt, documents)
                permit = _permit(self._vllm_config) if kind == "similar" else ""
                if openings:
                    header = tuple(ingest_context("header", tokenizer, self._config.system_prompt))
            shard = (ranks.rank, ranks.size)
            pin, decoding = self._paged.device.type == "cuda", self._paged.caches is None
            self._store = open_store(self._config, shard, pin=pin, decoding=decoding)
            catalogue = open_catalogue(self._config)
            encoding: Encoding = "none" if decoding else self._config.encoding
            self._writer = Writer(self._store, catalogue, shard, self._paged.device, encoding)
            loader = _fastest_loader(self._paged)
            self._hot = HotChunks(hot_bytes(self._vllm_config), self._paged.device)
            self._blender = Blender(self._paged, forward, loader, self._store, self._hot, len(context), ranks)
            longest = int(self._vllm_config.model_config.max_model_len)
            self._audit = Audit(self._paged, forward, loader, self._store, context, longest)
            if self._config.planner:
                pace = self._rehearse(forward, loader, len(context), ranks, encoding)
                self._stopwatch = Stopwatch(self._paged.device)
                self._scout = Scout(self._store)
                self._scout.measure(catalogue)
                loads = self._scout.take_loads()
                logger.info("kvblend's planner goes by %s and %s.", pace, loads)
        except (Refused, ValueError, KVBlendError) as error:
            refusal = str(error).rstrip(".")
            logger.warning("kvblend does not blend: %s.", refusal)
        return Handshake(identity, tuple(context), refusal, ranks.rank, ranks.size, pace, tuple(loads), header, permit)

    def _rehearse(
        self, forward: ScatteredForward, loader: Loader, context_tokens: int, ranks: Ranks, encoding: Encoding
    ) -> Pace | None:
        """How fast this worker computes and blends, in free blocks, before the first request."""
        shelf, nothing_hot = Shelf(self._paged, encoding), HotChunks(0, self._paged.device)
        model = self._vllm_config.model_config
        rehearsal = Rehearsal(
            self._paged,
            forward,
            Blender(self._paged, forward, loader, shelf, nothing_hot, context_tokens, ranks).blend,
            shelf,
            ranks,
            blocks=self._runner.kv_cache_config.num_blocks,
            max_model_len=int(model.max_model_len),
            vocabulary=model.get_vocab_size(),
        )
        return rehearsal.run(recipe_of(self._config))


def _config(vllm_config: VllmConfig) -> BlendConfig:
    transfer = vllm_config.kv_transfer_config
    return BlendConfig.load(**({} if transfer is None else transfer.kv_connector_extra_config))


def _permit(vllm_config: VllmConfig) -> str:
    """What all processes of this vLLM know, and nobody over HTTP: the random name that it gives a connector."""
    assert vllm_config.kv_transfer_config is not None
    return str(vllm_config.kv_transfer_config.engine_id).partition("_dp")[0]  # to which each data parallel rank adds


def hot_bytes(vllm_config: VllmConfig) -> int:
    """Device memory set aside for chunks; none on a CPU, whose memory tier is as near."""
    if not current_platform.is_cuda():
        return 0
    return int(_config(vllm_config).max_device_gb * _GIB)


def _of_request(known: OrderedDict[str, T], request_id: str) -> T | None:
    """What is known under a name that vLLM made of a request's: with a number in front (n > 1), that of the prompt
    behind it (completions) or of the turn (responses), and a suffix."""
    if request_id in known:
        return known[request_id]
    name = re.compile(rf"(\d+_)?{re.escape(request_id)}([-_]\d+)?(-[0-9a-f]+)?")
    return next((known[each] for each in reversed(known) if name.fullmatch(each)), None)


def _fastest_loader(paged: PagedKV) -> Loader:
    """The fastest that this device and cache layout allow."""
    if paged.caches is not None:
        from kvblend_rag.vllm_plugin.worker.stream_loader import StreamLoader  # needs Triton

        return StreamLoader(paged)
    return DirectLoader(paged)


__all__ = ["WorkerSide", "hot_bytes"]
