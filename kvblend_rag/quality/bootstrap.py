"""Intervals by resampling questions: all arms of a question stay together, so comparisons are paired."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

DRAWS = 4000
LEVEL = 0.95
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def to_list(self) -> list[float]:
        """``[value, low, high]``, rounded for JSON."""
        return [round(each, 5) for each in (self.value, self.low, self.high)]


def mean(values: Values, *, seed: int = 0, level: float = LEVEL) -> Interval:
    """The mean over questions.

    Args:
        values: shape (questions,).
        seed: the same one draws the same resamples, of equally many questions.
        level: of the interval.
    """
    return _interval(values[:, None], lambda means: means[..., 0], seed, level)


def ratio(values: Values, reference: Values, *, seed: int = 0) -> Interval:
    """The mean over questions as a share of a reference's mean; both of shape (questions,).

    NaN where the reference's mean is zero.
    """
    pairs = np.stack([values, reference], axis=1)

    def share(means: Values) -> Values:
        below = means[..., 1]
        return np.divide(means[..., 0], below, out=np.full_like(below, np.nan), where=below != 0)

    return _interval(pairs, share, seed)


@lru_cache(maxsize=4)  # the same for all arms and figures of a group; 13 MB for 400 questions
def _weights(questions: int, seed: int) -> Values:
    """(DRAWS, questions): what share each question has in each resample."""
    drawn = np.random.default_rng(seed).integers(0, questions, (DRAWS, questions))
    drawn += questions * np.arange(DRAWS)[:, None]
    return np.bincount(drawn.ravel(), minlength=DRAWS * questions).reshape(DRAWS, questions) / questions


def _interval(values: Values, statistic: Callable[[Values], Values], seed: int, level: float = LEVEL) -> Interval:
    if not len(values):
        return Interval(float("nan"), float("nan"), float("nan"))
    tail = (1 - level) / 2
    several = statistic(_weights(len(values), seed) @ values)
    known = several[~np.isnan(several)]
    low, high = np.quantile(known, [tail, 1 - tail]) if len(known) else (np.nan, np.nan)
    return Interval(float(statistic(values.mean(axis=0)[None])[0]), float(low), float(high))


__all__ = ["DRAWS", "LEVEL", "Interval", "Values", "mean", "ratio"]
