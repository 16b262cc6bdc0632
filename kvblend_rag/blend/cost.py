"""What a request costs, computed plainly and blended: seconds, from measured paces.

A forward of n tokens takes ``fixed + token·n + pair·p + row·r`` seconds: p counts the keys that its queries see,
r the sequences that its tokens are shown as. It takes ``least`` at least: a GPU has done few tokens before the host has
asked for them all. Reading takes a time for each read and one for each byte. All of it is measured on the machine, none
is guessed; see ``vllm_plugin/worker/rehearsal.py`` and ``blend/drift.py``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvblend_rag.blend.plan import BlendPlan

Range = tuple[int, int]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Work:
    """What goes through the model in one go, or one after the other where it is too much for one."""

    tokens: float = 0.0
    pairs: float = 0.0
    """Keys that the queries see, summed over the queries."""
    rows: float = 0.0
    """Sequences that the attention backend is shown."""

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.pairs + other.pairs, self.rows + other.rows)

    @classmethod
    def of(cls, ranges: Iterable[Range]) -> Work:
        """Of prompt ranges ``[start, stop)``, each a row whose queries see everything before them."""
        given = [(start, stop) for start, stop in ranges if start < stop]
        return cls(
            float(sum(stop - start for start, stop in given)),
            float(sum(_pairs(start, stop) for start, stop in given)),
            float(len(given)),
        )


@dataclass(frozen=True)
class ForwardPace:
    """Seconds of a forward pass."""

    fixed: float
    token: float
    pair: float = 0.0
    row: float = 0.0
    max_tokens: int = 1 << 30
    """Tokens of one pass; more take several."""
    max_rows: int = 1 << 30
    least: float = 0.0
    """A pass takes no less, however little goes through it."""

    def seconds(self, work: Work) -> float:
        """Of this work, in as few passes as it fits into; 0 of none."""
        if work.tokens <= 0:
            return 0.0
        passes = max(math.ceil(work.tokens / self.max_tokens), math.ceil(work.rows / self.max_rows), 1)
        return max(passes * self.fixed + self.marginal(work), passes * self.least)

    def marginal(self, work: Work) -> float:
        """What it adds to a pass that is made anyway."""
        return self.token * work.tokens + self.pair * work.pairs + self.row * work.rows

    @classmethod
    def fit(
        cls,
        samples: Sequence[tuple[Work, float]],
        *,
        max_tokens: int = 1 << 30,
        max_rows: int = 1 << 30,
        least: float = 0.0,
    ) -> ForwardPace:
        """The pace that measured passes tell, none of its parts negative.

        Args:
            samples: single passes and their seconds.
            max_tokens: as the attribute.
            max_rows: as the attribute.
            least: as the attribute.

        Raises:
            ValueError: no samples.
        """
        if not samples:
            raise ValueError("No forward pass was measured.")
        features = np.array([[1.0, work.tokens, work.pairs, work.rows] for work, _ in samples])
        seconds = np.array([each for _, each in samples])
        fixed, token, pair, row = fit_nonnegative(features, seconds)
        return cls(fixed, token, pair, row, max_tokens, max_rows, least)


@dataclass(frozen=True)
class ReadPace:
    """Seconds of bringing chunks from a tier into host memory."""

    read: float
    """Of a read, whatever its size."""
    byte: float

    def seconds(self, reads: float, nbytes: float) -> float:
        """Of so many reads one after the other, of so many bytes together."""
        return self.read * reads + self.byte * nbytes


@dataclass(frozen=True)
class Pace:
    """How fast this engine computes and blends."""

    forward: ForwardPace
    blend: float
    """Seconds of a blend beyond its forward passes, whatever its length."""
    placed: float
    """Seconds to turn and place a reused token."""
    token_bytes: int
    """Of a token's KV in host memory."""
    question_share: float = 1.0
    """Of the layers: what computed tokens go through once more where the question chooses."""
    deviation_share: float = 1.0
    """Of the layers: what all tokens go through where deviation chooses."""
    middle_share: float = 1.0
    """As ``question_share``, where the middle layers alone are looked at: every other choice goes up to the last."""


@dataclass(frozen=True)
class Effort:
    """What a selector makes the worker compute."""

    ratio: float
    """Share of the reused tokens that is recomputed, at most."""
    span: int
    computed_share: float = 0.0
    """Share of the layers that the computed tokens go through once more to be scored by."""
    whole_share: float = 0.0
    """Share of the layers that all tokens behind the cached ones go through to be scored."""

    def recomputed(self, plan: BlendPlan) -> Work:
        """Spans of the reused tokens, which may stand anywhere in their runs."""
        tokens = [self.ratio * run.length for run in plan.runs]
        pairs = sum(self.ratio * _pairs(run.start, run.stop) for run in plan.runs)
        return Work(sum(tokens), pairs, sum(tokens) / self.span)


def plain_seconds(plan: BlendPlan, pace: Pace) -> float:
    """To the end of the prompt, from the tokens in the prefix cache on, without any chunk."""
    return pace.forward.seconds(Work.of([(plan.cached, plan.prompt_tokens)]))


def blend_work(plan: BlendPlan, effort: Effort) -> Work:
    """All that a blend puts through the model in the step that admits it, scored tokens among it."""
    computed = Work.of(plan.computed_ranges())
    whole = Work.of([(plan.cached, plan.prompt_tokens)])
    scored = [
        Work(*(share * part for part in (work.tokens, work.pairs, work.rows)))
        for share, work in ((effort.computed_share, computed), (effort.whole_share, whole))
    ]
    return computed + effort.recomputed(plan) + scored[0] + scored[1]


def blend_seconds(plan: BlendPlan, effort: Effort, pace: Pace) -> float:
    """To the end of the prompt with the plan's chunks, these being in host memory."""
    forward, computed = pace.forward, Work.of(plan.computed_ranges())
    scored = effort.computed_share * forward.seconds(computed)
    if effort.whole_share:
        scored += effort.whole_share * forward.seconds(Work.of([(plan.cached, plan.prompt_tokens)]))
    last = forward.seconds(Work.of([(plan.prompt_tokens - 1, plan.prompt_tokens)]))
    done = computing_seconds(plan, effort, pace)
    return pace.blend + pace.placed * plan.reused_tokens + scored + done + last


def computing_seconds(plan: BlendPlan, effort: Effort, pace: Pace) -> float:
    """The part of a blend that computes what is not reused, all of the prompt where everything is recomputed."""
    return pace.forward.seconds(Work.of(plan.computed_ranges()) + effort.recomputed(plan))


def fit_nonnegative(features: Floats, seconds: Floats, weights: Floats | None = None) -> list[float]:
    """Least squares of the relative errors, no coefficient negative; exact, for the few columns there are.

    Args:
        features: (samples, columns) float.
        seconds: (samples,) float, positive.
        weights: (samples,) float, of the squared errors; None: all the same.
    """
    target = np.sqrt(np.ones(len(seconds)) if weights is None else weights)
    scaled = features * (target / seconds)[:, None]
    columns = features.shape[1]
    best, least = np.zeros(columns), np.inf
    for count in range(1, columns + 1):
        for chosen in map(list, itertools.combinations(range(columns), count)):
            found, *_ = np.linalg.lstsq(scaled[:, chosen], target, rcond=None)
            error = float(((scaled[:, chosen] @ found - target) ** 2).sum())
            if (found >= 0).all() and error < least - 1e-12:
                best, least = np.zeros(columns), error
                best[chosen] = found
    return [float(each) for each in best]


def _pairs(start: int, stop: int) -> float:
    """Keys that the queries of a range see: each those before it and itself."""
    return (stop - start) * (start + stop + 1) / 2


__all__ = [
    "Effort",
    "ForwardPace",
    "Pace",
    "ReadPace",
    "Work",
    "blend_seconds",
    "blend_work",
    "computing_seconds",
    "fit_nonnegative",
    "plain_seconds",
]
