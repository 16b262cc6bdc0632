"""The scheduler's side: match → plan → what the workers do, and each request's report."""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorWorkerMetadata,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from kvblend_rag.address import RemoteAddress
from kvblend_rag.blend.choice import Choice
from kvblend_rag.blend.chunk import TokenIds, as_token_ids, chunk_key
from kvblend_rag.blend.context import COMPANION_TOKENS
from kvblend_rag.blend.cost import Work, blend_work
from kvblend_rag.blend.gate import refusal
from kvblend_rag.blend.plan import BlendPlan, make_plan
from kvblend_rag.calibration.risk import Signals
from kvblend_rag.calibration.verdict import Verdict, find_verdict
from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import KVBlendError
from kvblend_rag.ingest import STORING
from kvblend_rag.report import SAME_BLEND, BlendReport, ChunkUse
from kvblend_rag.selectors import get_selector
from kvblend_rag.selectors.base import Evidence
from kvblend_rag.store import layout_of
from kvblend_rag.vllm_plugin.effort import effort_of
from kvblend_rag.vllm_plugin.metadata import (
    BlendJob,
    Closing,
    Handshake,
    Outcome,
    Recipe,
    SaveJob,
    SeenPrompt,
    StepOutcome,
    StepPlan,
)
from kvblend_rag.vllm_plugin.metrics import BlendStats
from kvblend_rag.vllm_plugin.request import PARAMETER, Ingest, facts, read_wish
from kvblend_rag.vllm_plugin.scheduler.closing import ClosingDesk
from kvblend_rag.vllm_plugin.scheduler.crowd import Crowd
from kvblend_rag.vllm_plugin.scheduler.errands import Errands
from kvblend_rag.vllm_plugin.scheduler.library import Library
from kvblend_rag.vllm_plugin.scheduler.planner import Planner
from kvblend_rag.vllm_plugin.scheduler.prefix_cache import isolate, still_computing

logger = logging.getLogger(__name__)

_DIGESTS_REMEMBERED = 4096
_PATIENCE = 2.0
"""A request waits for its chunks to be brought near so many times as long as that should take."""

_PREFILL = 32
"""Tokens of one request in a step from which on it is a prefill, and tells something about how long those take."""

_UNCOUNTED = 4096  # bounded for the case that nobody asks for statistics


@dataclass
class _Blend:
    """A request that will be blended."""

    token_ids: TokenIds
    plan: BlendPlan
    recipe: Recipe
    digest: str
    undecided: bool = False
    """Whether its chunks are worth loading is yet to be weighed."""
    patience: float = math.inf
    """Until when it waits for its chunks to be brought near, on the monotonic clock."""
    isolated: bool = False

    def take(self, plan: BlendPlan) -> None:
        """Blend by this plan, which holds some of the runs that were found."""
        self.plan, self.digest = plan, _digest(plan, self.recipe)


@dataclass
class _Saving:
    """A chunk that is being computed in order to be stored."""

    token_ids: TokenIds
    ingest: Ingest
    blocks: list[int] = field(default_factory=list)
    fresh: bool = False
    """The blocks were learned at admission, in this very step."""


class SchedulerSide:
    """Lives in the scheduler's process; sees requests and block ids, never a tensor."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._config = BlendConfig.load(**vllm_config.kv_transfer_config.kv_connector_extra_config)
        self._block_size = int(vllm_config.cache_config.block_size)
        self._cache_config = vllm_config.cache_config
        self._model_refusal: str | None = "the workers did not report; start vLLM with kvblend's worker class"
        self._verdict_refusal: str | None = None
        self._library: Library | None = None
        self._permit = ""
        self._live: dict[str, Request] = {}
        self._blends: dict[str, _Blend] = {}
        self._savings: dict[str, _Saving] = {}
        self._jobs: list[BlendJob] = []
        self._reports: dict[str, BlendReport] = {}
        self._answered: dict[str, tuple[dict[str, Any], str]] = {}
        """Reports handed out in this step and blends' digests; the workers' account may still complete them."""
        self._uncounted: deque[dict[str, Any]] = deque(maxlen=_UNCOUNTED)
        self._seen_digests: OrderedDict[str, Signals] = OrderedDict()
        """What each blend showed."""
        self._met_again: dict[str, Signals] = {}
        self._desk = ClosingDesk(vllm_config)
        self._seen_prompts: list[SeenPrompt] = []
        self._gate = "closed"
        self._planner: Planner | None = None
        self._choices: OrderedDict[str, BlendPlan] = OrderedDict()
        """What was chosen of all that was found, by the digest of the latter: the same prompt blends the same."""
        self._fetch: list[str] = []
        """Chunks that somebody waits for."""
        self._errands = Errands()
        self._number = 0
        self._crowd = Crowd(int(vllm_config.scheduler_config.max_num_batched_tokens))

    def learn(self, handshakes: list[KVConnectorHandshakeMetadata]) -> None:
        """Take in what the workers found out about the model."""
        ours = [handshake for handshake in handshakes if isinstance(handshake, Handshake)]
        if not ours:
            return
        first = min(ours, key=lambda handshake: handshake.rank)
        self._model_refusal = next((h.refusal for h in ours if h.refusal is not None), None)
        if self._model_refusal is not None:
            logger.warning("kvblend: every request gets an ordinary prefill: %s.", self._model_refusal)
            self._gate = "model"
            return
        self._library = Library(self._config, first.fingerprint, first.context, first.header)
        self._permit = first.permit
        try:
            self._heed(find_verdict(self._config, first.fingerprint, first.context))
        except KVBlendError as error:  # it may be a refusal
            self._verdict_refusal = str(error).rstrip(".")
            logger.warning("kvblend: every request gets an ordinary prefill: %s.", self._verdict_refusal)
            self._gate = "verdict"
        if not self._config.enable_blending:
            self._gate = "disabled"
        if first.pace is not None:
            layout, shard = layout_of(self._config), (first.rank, first.ranks)
            self._planner = Planner(
                first.pace,
                first.loads,
                [RemoteAddress.parse(url).tier for url in self._config.remote],
                lambda key: layout.chunk_path(key, shard).is_file(),
            )

    def _heed(self, verdict: Verdict | None) -> None:
        """Let a verdict's settings be the defaults, or blend nothing; said once."""
        self._gate = "open"
        if verdict is None or verdict.status == "undecided":
            self._gate = "uncalibrated"
            if self._config.enable_blending and self._config.heed_verdict:
                logger.warning(
                    "kvblend: this model has not been calibrated; %.0f %% of the reused tokens are recomputed. "
                    "`kvblend calibrate` measures what it needs.",
                    100 * self._config.recompute_ratio,
                )
        elif verdict.accepted:
            self._config = verdict.applied_to(self._config)
        else:
            self._gate = "verdict"
            self._verdict_refusal = verdict.reason.rstrip(".")
            logger.warning("kvblend: calibration refused this model, nothing is blended: %s.", self._verdict_refusal)

    def arrived(self, request: Request) -> None:
        """Match and plan a new request, on the scheduler's thread."""
        self._live[request.request_id] = request
        report = BlendReport(request_id=request.request_id, prompt_tokens=request.num_prompt_tokens)
        try:
            reason, report = self._plan(request, report)
        except KVBlendError as error:
            reason = str(error)
        self._reports[request.request_id] = replace(report, reason=reason)

    def claim(self, request: Request, cached: int) -> int | None:
        """How many tokens behind the prefix-cache hit are provided; None to be asked again next step."""
        if request.num_preemptions == 0:
            self._note(request.request_id, cached_tokens=cached)
        self._crowd.look(self._live.values())
        if self._crowd.closed:
            return None
        blend = self._blends.get(request.request_id)
        if blend is not None and blend.undecided:
            self._weigh(request, blend, cached)
            blend = self._blends.get(request.request_id)
        plan = None if blend is None else blend.plan.clip(cached, self._config.min_run)
        if blend is None or plan is None or not plan.runs:
            return 0 if self._crowd.takes_plain(request.num_tokens - cached) else None
        if blend.undecided or not self._crowd.takes_blend(self._tokens(plan, blend.recipe)):
            return None
        block_size = self._hash_block_size(request)
        if still_computing(request, cached // block_size, block_size, self._live.values()):
            return None
        if not blend.isolated:
            first = plan.first_reused
            assert first is not None
            isolate(request, first // block_size, blend.digest)
            blend.isolated = True
            if self._seen(blend.digest):
                # The same prompt was blended before: look again, now under the private hashes.
                return None
        return max(plan.prompt_tokens - 1 - cached, 0)

    def admitted(self, request: Request, block_ids: list[int], external: int) -> None:
        """The request has its blocks; ``external`` tokens of it are ours to provide."""
        saving = self._savings.get(request.request_id)
        if saving is not None:
            saving.blocks, saving.fresh = list(block_ids), True
        blend = self._blends.get(request.request_id)
        if blend is None:
            return
        if external <= 0:
            # After a preemption the report tells of the blend that was, and what is missing is computed.
            if not self._reports[request.request_id].blended:
                if not blend.isolated:
                    self._note(request.request_id, reason="the prompt was in vLLM's own prefix cache")
                else:
                    self._note(request.request_id, reason=SAME_BLEND)
                    self._met_again[request.request_id] = self._seen_digests.get(blend.digest, Signals())
            return
        first = blend.plan.prompt_tokens - 1 - external
        plan = blend.plan.clip(first, self._config.min_run)
        self._crowd.admit(self._tokens(plan, blend.recipe))
        if self._planner is not None:
            self._planner.blends(request.request_id, plan, blend.recipe)
        self._jobs.append(
            BlendJob(
                request.request_id, blend.token_ids, np.array(block_ids, dtype=np.int32), first, plan, blend.recipe
            )
        )
        self._note(
            request.request_id,
            blended=True,
            reason=None,
            selector=blend.recipe.selector,
            cached_tokens=plan.cached,
            reused_tokens=plan.reused_tokens,
            computed_tokens=plan.computed_tokens,
            chunks=tuple(ChunkUse(key=run.key, start=run.start, tokens=run.length) for run in plan.runs),
        )

    def step(self, scheduler_output: SchedulerOutput) -> StepPlan:
        """What the workers do in this step."""
        saves = self._finished_chunks(scheduler_output) if self._savings else []
        closing = Closing(self._desk.take(), self._seen_prompts, busy=self._busy(scheduler_output))
        self._number += 1
        prefills = max(scheduler_output.num_scheduled_tokens.values(), default=0) >= _PREFILL
        fetch = self._fetch + self._errands.take(prefills or bool(self._jobs))
        plan = StepPlan(self._jobs, saves, self._met_again, closing, self._number, fetch)
        if self._planner is not None:
            if saves and self._config.local_device == "cpu":
                self._planner.saved(job.key for job in saves)
            elif prefills and not saves:  # copying them out takes part of the step
                self._planner.steps(self._number, _work(scheduler_output))
        self._jobs, self._met_again, self._fetch, self._seen_prompts = [], {}, [], []
        self._crowd.next_step()
        self._answered.clear()
        return plan

    def worker_reported(self, outcome: KVConnectorWorkerMetadata | None) -> None:
        """Complete reports by what the workers did.

        A request that ends with its first token is answered before this is called; the answer is sent
        only afterwards, so its report is completed in place.
        """
        if not isinstance(outcome, StepOutcome):
            return
        if self._planner is not None:
            self._planner.learn(outcome)
        for request_id, done in outcome.outcomes.items():
            blend = self._blends.get(request_id)
            digest = blend.digest if blend is not None else ""
            if request_id in self._reports:
                self._reports[request_id] = _completed(self._reports[request_id], done)
            elif request_id in self._answered:
                answer, digest = self._answered.pop(request_id)
                answer[PARAMETER] = _completed(BlendReport.from_dict(answer[PARAMETER]), done).to_dict()
            if digest in self._seen_digests:
                self._seen_digests[digest] = done.signals

    def finished(self, request: Request) -> dict[str, Any]:
        """The request has ended: its report, for its last output."""
        request_id = request.request_id
        self._live.pop(request_id, None)
        blend = self._blends.pop(request_id, None)
        self._savings.pop(request_id, None)
        self._jobs = [job for job in self._jobs if job.request_id != request_id]
        report = self._reports.pop(request_id, BlendReport(request_id=request_id))
        if not report.blended:
            report = replace(report, computed_tokens=report.prompt_tokens - report.cached_tokens)
        answer = {PARAMETER: report.to_dict()}
        self._answered[request_id] = answer, blend.digest if blend is not None else ""
        self._uncounted.append(answer)
        self._desk.end(request, answer[PARAMETER])
        return answer

    def take_stats(self) -> BlendStats:
        """Counts of the requests that ended since the last call; the workers' account is in by now."""
        stats = BlendStats()
        for answer in self._uncounted:
            stats.count(BlendReport.from_dict(answer[PARAMETER]))
        if self._uncounted:
            stats.show_gate(self._gate)
        self._uncounted.clear()
        return stats

    def close(self) -> None:
        """Close the catalogue."""
        if self._library is not None:
            self._library.close()

    def _plan(self, request: Request, report: BlendReport) -> tuple[str | None, BlendReport]:
        """Why the request is not blended, or None; and the report with what matching took."""
        wish = read_wish(request, self._config)
        blocked = refusal(
            facts(request),
            model=self._model_refusal,
            enabled=self._config.enable_blending or wish.ingest is not None,
            wanted=wish.blend,
            verdict=None if wish.ingest is not None else self._verdict_refusal,
        )
        if blocked is not None:
            return blocked, report
        assert self._library is not None
        planner = self._planner if wish.planner and wish.ingest is None else None
        hopeless = None if planner is None else planner.hopeless(request.num_prompt_tokens, wish.recipe)
        if hopeless is not None:
            return hopeless, report
        started = time.perf_counter()
        prompt = as_token_ids(request.prompt_token_ids)
        if wish.ingest is not None:
            return self._plan_saving(request.request_id, prompt, wish.ingest, wish.tenant), report
        # Where every token is computed again no stored KV counts, an exact one neither.
        openings = get_selector(wish.recipe.selector).share != 1
        plan = make_plan(prompt, self._library.match(wish.tenant, prompt, openings), self._config.min_run)
        if self._config.learn_seen:
            known = tuple((run.start, run.stop) for run in plan.runs)
            self._seen_prompts.append(SeenPrompt(wish.tenant, prompt, known))
        report = replace(report, milliseconds={"match": (time.perf_counter() - started) * 1e3})
        if not plan.runs:
            return self._nothing_matched(wish.tenant), report
        recipe = wish.recipe
        self._blends[request.request_id] = _Blend(prompt, plan, recipe, _digest(plan, recipe), planner is not None)
        return None, report

    def _weigh(self, request: Request, blend: _Blend, cached: int) -> None:
        """Decide which of the chunks are loaded, or to blend nothing, or not to decide yet."""
        assert self._planner is not None
        if blend.digest in self._choices:
            blend.take(self._choices[blend.digest])
        if blend.digest in self._seen_digests:
            blend.undecided = False  # its KV may well be in the prefix cache
            return
        found = blend.plan.clip(cached, self._config.min_run)
        if not found.runs:
            return
        choice = self._planner.choose(found, blend.recipe)
        reason = choice.reason
        if choice.worth_it and self._crowd.answers:
            reason = self._crowd.too_large(self._tokens(choice.plan, blend.recipe))
            step = self._planner.pace.forward.seconds(Work(self._crowd.limit))
            if reason is None and choice.loading > step:
                reason = self._wait_for_chunks(blend, choice, step)
                if reason is None:
                    return
        self._errands.add(choice.slow)
        if reason is not None:
            del self._blends[request.request_id]
            self._note(request.request_id, reason=reason)
            return
        left_out = {(run.key, run.stop) for run in found.runs if run not in choice.plan.runs}
        if left_out:
            whole = blend.digest
            blend.take(blend.plan.keeping(run for run in blend.plan.runs if (run.key, run.stop) not in left_out))
            self._choices[whole] = blend.plan
            if len(self._choices) > _DIGESTS_REMEMBERED:
                self._choices.popitem(last=False)
        blend.undecided = False

    def _wait_for_chunks(self, blend: _Blend, choice: Choice, step: float) -> str | None:
        """Have far chunks brought near beside running answers, which loading them here would hold up; a reason if
        that took too long."""
        now = time.monotonic()
        if blend.patience == math.inf:
            blend.patience = now + _PATIENCE * choice.loading
            self._fetch.extend(run.key for run in choice.plan.runs)
        if now < blend.patience:
            return None
        return (
            f"its chunks were not loaded in time, and waiting for them would hold up running answers: "
            f"{choice.loading * 1e3:,.0f} ms, where a step takes {step * 1e3:,.0f} ms"
        )

    def _tokens(self, plan: BlendPlan, recipe: Recipe) -> int:
        """That blending by this plan puts through the model in one step; without a pace, at most."""
        if self._planner is not None:
            return self._planner.tokens(plan, recipe)
        return round(blend_work(plan, effort_of(recipe, None)).tokens)

    def _plan_saving(self, request_id: str, prompt: TokenIds, ingest: Ingest, tenant: str) -> str | None:
        assert self._library is not None
        tokens = prompt[ingest.start :]
        context = self._library.contexts(tenant).get(ingest.namespace)
        if context is None or ingest.key != chunk_key(ingest.namespace, tokens):
            return "the chunk's key does not belong to this model, ingest context and tenant; nothing was stored"
        # The key stands for what is in front of the chunk too: it must be there, or the store is poisoned.
        beside = ingest.permit and ingest.permit == self._permit and context is self._library.context
        fixed = len(context) - (COMPANION_TOKENS if beside else 0)
        behind = ingest.start == len(context) and np.array_equal(prompt[:fixed], context[:fixed])
        if not len(tokens) or not behind:
            return "the chunk does not stand right behind the ingest context; nothing was stored"
        self._savings[request_id] = _Saving(tokens, ingest)
        return STORING

    def _nothing_matched(self, tenant: str) -> str:
        assert self._library is not None
        known = self._library.size(tenant)
        return (
            f"none of the {known} stored chunks stands in the prompt"
            if known
            else "the store holds no chunks for this model and ingest context"
        )

    def _busy(self, scheduler_output: SchedulerOutput) -> bool:
        """Whether the step computes anything but chunks to be stored; asked where chunks are learned alone."""
        scheduled = scheduler_output.num_scheduled_tokens if self._config.learn_seen else ()
        return any(name in self._reports and self._reports[name].reason != STORING for name in scheduled)

    def _finished_chunks(self, scheduler_output: SchedulerOutput) -> list[SaveJob]:
        """Chunks whose last token is computed in this step."""
        progress = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        running = scheduler_output.scheduled_cached_reqs
        for index, request_id in enumerate(running.req_ids):
            progress[request_id] = running.num_computed_tokens[index]
            saving = self._savings.get(request_id)
            blocks = running.new_block_ids[index]
            if saving is not None and blocks is not None and not saving.fresh:
                saving.blocks.extend(blocks[0])
        jobs = []
        for request_id, saving in list(self._savings.items()):
            saving.fresh = False
            if request_id not in progress:
                continue
            stop = saving.ingest.start + len(saving.token_ids)
            if progress[request_id] + scheduler_output.num_scheduled_tokens[request_id] >= stop:
                ingest = saving.ingest
                jobs.append(
                    SaveJob(
                        request_id,
                        ingest.key,
                        ingest.namespace,
                        saving.token_ids,
                        ingest.start,
                        np.array(saving.blocks, dtype=np.int32),
                    )
                )
                del self._savings[request_id]
        return jobs

    def _hash_block_size(self, request: Request) -> int:
        """Tokens a block hash stands for; 0.32 may hash finer than it allocates."""
        size = int(getattr(self._cache_config, "hash_block_size", None) or self._block_size)
        if request.block_hashes and len(request.block_hashes) == request.num_tokens // size:
            return size
        return self._block_size

    def _seen(self, digest: str) -> bool:
        """Whether a digest was blended before; it has been from now on."""
        known = digest in self._seen_digests
        self._seen_digests.setdefault(digest, Signals())
        self._seen_digests.move_to_end(digest)
        if len(self._seen_digests) > _DIGESTS_REMEMBERED:
            self._seen_digests.popitem(last=False)
        return known

    def _note(self, request_id: str, **changes: Any) -> None:
        self._reports[request_id] = replace(self._reports[request_id], **changes)


def _digest(plan: BlendPlan, recipe: Recipe) -> str:
    return plan.digest(
        recipe.selector,
        recipe.ratio,
        recipe.span,
        sees_question=Evidence.QUESTION_ATTENTION in get_selector(recipe.selector).needs,
        coverage=recipe.coverage,
        full_share=recipe.full_share,
        layers=recipe.layers,
        carry=recipe.carry,
    )


def _work(step: SchedulerOutput) -> Work:
    """What vLLM itself computes in a step."""
    begins = {new.req_id: new.num_computed_tokens for new in step.scheduled_new_reqs}
    running = step.scheduled_cached_reqs
    begins.update(zip(running.req_ids, running.num_computed_tokens, strict=True))
    return Work.of((first, first + step.num_scheduled_tokens[request_id]) for request_id, first in begins.items())


def _completed(report: BlendReport, done: Outcome) -> BlendReport:
    """A report with the workers' account of the request."""
    milliseconds = {**report.milliseconds, **done.milliseconds}
    if done.fallback is not None:
        return replace(
            report,
            blended=False,
            reason=done.fallback,
            reused_tokens=0,
            computed_tokens=report.computed_tokens + report.reused_tokens,
            scored_tokens=done.scored_tokens,
            loads=done.loads,
            milliseconds=milliseconds,
        )
    recomputed = sum(stop - start for start, stop in done.recomputed)
    return replace(
        report,
        reused_tokens=report.reused_tokens - recomputed,
        recomputed_tokens=recomputed,
        recomputed_spans=done.recomputed,
        scored_tokens=done.scored_tokens,
        uncovered_mass=done.uncovered,
        moved_mass=done.moved,
        loads=done.loads,
        chunks=tuple(replace(chunk, tier=done.tiers.get(chunk.key, "")) for chunk in report.chunks),
        milliseconds=milliseconds,
    )


__all__ = ["SchedulerSide"]
