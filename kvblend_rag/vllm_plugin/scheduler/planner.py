"""Planner: what the scheduler knows of the engine's pace and of where chunks lie, and what it decides by that."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kvblend_rag.blend.choice import READS_AT_ONCE, Choice, Tier, choose, hopeless, reading_seconds
from kvblend_rag.blend.cost import Effort, Pace, ReadPace, Work, blend_seconds, blend_work
from kvblend_rag.blend.drift import Drift
from kvblend_rag.blend.plan import BlendPlan
from kvblend_rag.blend.readings import Readings
from kvblend_rag.report import TierLoad
from kvblend_rag.vllm_plugin.effort import effort_of
from kvblend_rag.vllm_plugin.metadata import DEVICE, Outcome, Recipe, StepOutcome

_MEMORY = Tier("memory", ReadPace(0.0, 0.0))
_REMEMBERED = 256
"""Steps and blends whose time is waited for; a worker is never so far behind."""


class Planner:
    """Chooses, and learns from what the workers measured.

    Args:
        pace: as rehearsed by a worker.
        loads: what reading some stored chunks took when the worker started.
        remote: names of the remote tiers, the fastest first.
        on_disk: whether a chunk lies on this host's disk; asked only where there are remote tiers.
    """

    def __init__(
        self,
        pace: Pace,
        loads: Iterable[TierLoad],
        remote: Sequence[str] = (),
        on_disk: Callable[[str], bool] = lambda key: True,
    ) -> None:
        self.pace = pace
        self._remote, self._on_disk = tuple(remote), on_disk
        self._near: set[str] = set()
        self._far: OrderedDict[str, str] = OrderedDict()
        """Remote tier from which a chunk was loaded last."""
        self._readings: dict[str, Readings] = {}
        self._plain, self._blends = Drift(), Drift()
        self._steps: OrderedDict[int, Work] = OrderedDict()
        self._expected: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """Tokens and predicted seconds of blends under way, by request."""
        self._learn_loads(loads)

    def choose(self, plan: BlendPlan, recipe: Recipe) -> Choice:
        """What of a plan's runs is loaded, if anything is."""
        choice = choose(
            plan,
            self._effort(recipe),
            self.pace,
            self.tier,
            plain_drift=self._plain.factor,
            blend_drift=self._blend_drift,
        )
        if not choice.worth_it:
            self._blends.forget(plan.prompt_tokens - plan.cached)
        return choice

    def hopeless(self, tokens: int, recipe: Recipe) -> str | None:
        """Why a prompt of so many tokens need not be looked at, if so."""
        reason = hopeless(
            tokens,
            self._effort(recipe),
            self.pace,
            plain_drift=self._plain.factor,
            blend_drift=self._blend_drift,
        )
        if reason is not None:
            self._blends.forget(tokens)
        return reason

    def tier(self, key: str) -> Tier:
        """Where a chunk lies, as far as is known."""
        if key in self._near:
            return _MEMORY
        if not self._remote or self._on_disk(key):
            return Tier("disk", self._pace_of("disk"))
        name = self._far.get(key, self._remote[0])
        return Tier(name, self._pace_of(name), remote=True)

    def loading(self, plan: BlendPlan) -> float:
        """Seconds until the plan's chunks are in host memory; those of an unknown tier left out."""
        tiers = {run.key: self.tier(run.key) for run in plan.runs}
        known = [run for run in plan.runs if tiers[run.key].pace is not None]
        return reading_seconds(known, tiers, self.pace.token_bytes)

    def tokens(self, plan: BlendPlan, recipe: Recipe) -> int:
        """That a blend puts through the model in the step that admits it."""
        return round(blend_work(plan, self._effort(recipe)).tokens)

    def saved(self, keys: Iterable[str]) -> None:
        """Chunks that were just computed in order to be stored: a worker keeps them in memory, if it has any."""
        self._near.update(keys)

    def blends(self, request_id: str, plan: BlendPlan, recipe: Recipe) -> None:
        """A request is blended in this step."""
        tokens = plan.prompt_tokens - plan.cached
        last = self.pace.forward.seconds(Work.of([(plan.prompt_tokens - 1, plan.prompt_tokens)]))
        self._expected[request_id] = tokens, blend_seconds(plan, self._effort(recipe), self.pace) - last
        _bound(self._expected)

    def steps(self, number: int, work: Work) -> None:
        """vLLM computes so much in this step, a prefill among it."""
        self._steps[number] = work
        _bound(self._steps)

    def learn(self, outcome: StepOutcome) -> None:
        """Take in what the workers did."""
        self._learn_loads(outcome.loads)
        for request_id, done in outcome.outcomes.items():
            self._learn_loads(done.loads)
            self._learn_tiers(done)
            tokens, predicted = self._expected.pop(request_id, (0.0, 0.0))
            if done.fallback is None and not any(load.tier in self._remote for load in done.loads):
                reading = sum(load.milliseconds for load in done.loads) / 1e3
                self._expected[request_id] = tokens, predicted + reading
        for key, there in outcome.in_memory.items():
            (self._near.add if there else self._near.discard)(key)
        for number, seconds in outcome.step_seconds.items():
            work = self._steps.pop(number, None)
            if work is not None:
                self._plain.observe(work.tokens, self.pace.forward.seconds(work), seconds)
        for request_id, seconds in outcome.blend_seconds.items():
            tokens, predicted = self._expected.pop(request_id, (0.0, 0.0))
            self._blends.observe(tokens, predicted, seconds)

    def _learn_tiers(self, done: Outcome) -> None:
        for key, tier in done.tiers.items():
            if tier not in ("memory", DEVICE):
                self._near.discard(key)  # if it is kept there from now on, the worker says so beside
            if tier in self._remote:
                self._far[key] = tier
                self._far.move_to_end(key)
                _bound(self._far, 1 << 16)

    def _learn_loads(self, loads: Iterable[TierLoad]) -> None:
        for load in loads:
            if load.tier in ("memory", DEVICE) or not load.chunks:
                continue
            # Reads at the same time count each: together they take as long as one of them.
            at_once = min(load.chunks, READS_AT_ONCE) if load.tier in self._remote else 1
            reads = -(-load.chunks // at_once)
            readings = self._readings.setdefault(load.tier, Readings())
            readings.observe(reads, load.bytes, load.milliseconds / 1e3 / at_once)

    def _blend_drift(self, tokens: float) -> float:
        """Until a blend is measured, what makes vLLM's steps slower than rehearsed is taken to slow it as much."""
        return self._blends.factor(tokens, unknown=max(self._plain.factor(tokens), 1.0))

    def _pace_of(self, tier: str) -> ReadPace | None:
        return self._readings[tier].pace() if tier in self._readings else None

    def _effort(self, recipe: Recipe) -> Effort:
        return effort_of(recipe, self.pace)


def _bound(known: OrderedDict[Any, Any], most: int = _REMEMBERED) -> None:
    while len(known) > most:
        known.popitem(last=False)


__all__ = ["Planner"]
