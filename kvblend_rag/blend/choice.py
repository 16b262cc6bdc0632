"""Choice: of each chunk found in a prompt, whether to load it, or to compute its tokens; and when to blend at all."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvblend_rag.blend.cost import Effort, Pace, ReadPace, Work, blend_seconds, computing_seconds, plain_seconds
from kvblend_rag.blend.match import Match
from kvblend_rag.blend.plan import BlendPlan

WORTH = 0.9
"""A blend must promise at most this share of the plain prefill's time: predictions err by some percent."""

READS_AT_ONCE = 32
"""Chunks that are read from a remote tier at the same time."""


@dataclass(frozen=True)
class Tier:
    """Where a chunk lies, to the planner."""

    name: str
    pace: ReadPace | None
    """None: how fast it is, nobody knows yet."""
    remote: bool = False
    """Its chunks are read at the same time, not one after the other."""


@dataclass(frozen=True)
class Choice:
    """What is best for one request."""

    plan: BlendPlan
    """With the runs that are loaded; with none, the request is computed plainly."""
    plain: float
    """Seconds of the plain prefill, as predicted."""
    blended: float
    """Seconds of the best blend, loading included, whether it is chosen or not."""
    loading: float = 0.0
    """Seconds of it that go by until its chunks are in host memory."""
    unknown: tuple[str, ...] = ()
    """Tiers that nobody has measured yet, and so were not read from."""
    slow: tuple[str, ...] = ()
    """Keys that lie where loading them takes too long, or nobody knows how long."""

    @property
    def worth_it(self) -> bool:
        """Whether anything is loaded."""
        return bool(self.plan.runs)

    @property
    def reason(self) -> str | None:
        """Why nothing is blended, in a sentence; None where something is."""
        if self.worth_it:
            return None
        if math.isinf(self.blended):
            tiers = " and ".join(self.unknown)
            return f"how fast chunks load from {tiers} is not known yet: the prompt was computed"
        blended, plain = _milliseconds(self.blended), _milliseconds(self.plain)
        if self.blended > self.plain:
            return f"loading the prompt's chunks would take longer than computing it: {blended} against {plain}"
        return f"loading the prompt's chunks would save next to nothing: {blended} against {plain}"


def choose(
    plan: BlendPlan,
    effort: Effort,
    pace: Pace,
    tier_of: Callable[[str], Tier],
    *,
    plain_drift: Callable[[float], float] = lambda tokens: 1.0,
    blend_drift: Callable[[float], float] = lambda tokens: 1.0,
) -> Choice:
    """The fastest way that can be predicted.

    A chunk's part in the cost is its own but for what several share: a remote tier is waited for once, and the
    blend's fixed cost is paid once. So each set of tiers is tried, in it those chunks that gain by themselves.

    Args:
        plan: every run found, behind what is cached.
        effort: what the selector computes.
        pace: the engine's.
        tier_of: a key's tier.
        plain_drift: by what a plain prefill of so many tokens is slower than predicted.
        blend_drift: the same for a blend of so many tokens.
    """
    tiers = {run.key: tier_of(run.key) for run in plan.runs}
    unknown = tuple(sorted({tier.name for tier in tiers.values() if tier.pace is None}))
    known = sorted({tier.name for tier in tiers.values() if tier.pace is not None})
    plain = plain_seconds(plan, pace) * plain_drift(plan.prompt_tokens - plan.cached)
    best, least, waited = plan.keeping([]), math.inf, 0.0

    def cost(kept: Sequence[Match]) -> tuple[float, float]:
        kept_plan = plan.keeping(kept)
        tokens = kept_plan.prompt_tokens - kept_plan.cached
        loading = reading_seconds(kept, tiers, pace.token_bytes)
        # What disturbed vLLM's steps when they were timed is no gain: the same tokens take us as long, at least.
        least = computing_seconds(kept_plan, effort, pace) * plain_drift(tokens)
        return loading + max(blend_seconds(kept_plan, effort, pace) * blend_drift(tokens), least), loading

    for size in range(1, len(known) + 1):
        for chosen in itertools.combinations(known, size):
            inside = [run for run in plan.runs if tiers[run.key].name in chosen and tiers[run.key].pace is not None]
            gaining = [run for run in inside if _gain(run, effort, pace, tiers[run.key]) > 0]
            for kept in (gaining, inside) if 0 < len(gaining) < len(inside) else (inside,):
                if not kept:
                    continue
                seconds, loading = cost(kept)
                if seconds < least:
                    best, least, waited = plan.keeping(kept), seconds, loading
    slow = tuple(dict.fromkeys(run.key for run in plan.runs if run not in best.runs and not _near(tiers[run.key])))
    if least > WORTH * plain:
        slow = tuple(dict.fromkeys(run.key for run in plan.runs if not _near(tiers[run.key])))
        return Choice(plan.keeping([]), plain, least, waited, unknown, slow)
    return Choice(best, plain, least, waited, unknown, slow)


def hopeless(
    tokens: int,
    effort: Effort,
    pace: Pace,
    *,
    plain_drift: Callable[[float], float] = lambda tokens: 1.0,
    blend_drift: Callable[[float], float] = lambda tokens: 1.0,
) -> str | None:
    """Why a prompt of so many tokens is not worth blending, whatever is found in it; None where it may be.

    Looking for chunks and weighing them takes a millisecond in a thousand tokens, which a tiny model computes in a few.
    A token costs a blend no less than the lesser of reusing and computing it; so that what lies in the prefix cache
    makes no difference to the answer, those that would cost it more than a plain prefill are left out.
    """
    forward, ours, theirs = pace.forward, blend_drift(tokens), plain_drift(tokens)
    plain = theirs * forward.seconds(Work.of([(0, tokens)]))
    each = forward.token + forward.pair * np.arange(1, tokens)  # the last is computed in any case
    reusing = pace.placed + effort.ratio * (each + forward.row / effort.span)
    token = ours * (effort.whole_share * each + np.minimum(reusing, (1 + effort.computed_share) * each))
    passes = 2 + effort.computed_share + effort.whole_share
    fixed = ours * (pace.blend + passes * (forward.fixed + forward.marginal(Work.of([(tokens - 1, tokens)]))))
    shortest = ours * (pace.blend + passes * forward.least)
    least = max(float(fixed + token.sum()), shortest)
    gain = np.minimum(token - WORTH * theirs * each, 0.0).sum()
    if effort.ratio >= 1:  # then it computes everything too
        least = max(least, plain)
    elif fixed + gain <= WORTH * (plain - theirs * each.sum()) and shortest <= WORTH * plain:
        return None
    blended, computed = _milliseconds(least), _milliseconds(plain)
    return f"no chunk could make it faster: a blend takes {blended} at least, computing it {computed}"


def reading_seconds(runs: Sequence[Match], tiers: Mapping[str, Tier], token_bytes: int) -> float:
    """Until the runs' chunks are in host memory; a chunk that stands twice is read once."""
    ends: dict[str, int] = {}
    for run in runs:
        ends[run.key] = max(ends.get(run.key, 0), run.chunk_start + run.length)
    seconds = 0.0
    for tier in {tiers[key].name: tiers[key] for key in ends}.values():
        assert tier.pace is not None
        inside = [tokens for key, tokens in ends.items() if tiers[key].name == tier.name]
        reads = math.ceil(len(inside) / READS_AT_ONCE) if tier.remote else len(inside)
        seconds += tier.pace.seconds(reads, sum(inside) * token_bytes)
    return seconds


def _gain(run: Match, effort: Effort, pace: Pace, tier: Tier) -> float:
    """Seconds that loading a run saves, what is shared with others left out."""
    assert tier.pace is not None
    forward, own = pace.forward, Work.of([(run.start, run.stop)])
    again = Work(effort.ratio * own.tokens, effort.ratio * own.pairs, effort.ratio * own.tokens / effort.span)
    computing = (1 + effort.computed_share) * forward.marginal(own)
    reading = tier.pace.seconds(0 if tier.remote else 1, (run.chunk_start + run.length) * pace.token_bytes)
    return computing - reading - pace.placed * run.length - forward.marginal(again)


def _near(tier: Tier) -> bool:
    return tier.pace is not None and tier.pace.read == tier.pace.byte == 0


def _milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:,.0f} ms" if value >= 10 else f"{value:.1f} ms"


__all__ = ["READS_AT_ONCE", "WORTH", "Choice", "Tier", "choose", "hopeless", "reading_seconds"]
