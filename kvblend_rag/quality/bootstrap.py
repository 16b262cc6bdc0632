"""Intervals by resampling questions: all arms of a question stay together, so comparisons are paired."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

DRAWS = 4000
_LEVEL = 0.95
# Draws at a time: of 4000 draws over 400 questions at once, an index would take 13 MB.
_BLOCK = 500

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


def mean(values: Values, *, seed: int = 0) -> Interval:
    """The mean over questions.

    Args:
        values: shape (questions,).
        seed: the same one draws the same resamples, of equally many questions.
    """
    return _interval(values[:, None], lambda means: means[..., 0], seed)


def ratio(values: Values, reference: Values, *, seed: int = 0) -> Interval:
    """The mean over questions as a share of a reference's mean; both of shape (questions,).

    NaN where the reference's mean is zero.
    """
    pairs = np.stack([values, reference], axis=1)

    def share(means: Values) -> Values:
        below = means[..., 1]
        return np.divide(means[..., 0], below, out=np.full_like(below, np.nan), where=below != 0)

    return _interval(pairs, share, seed)


def _interval(values: Values, statistic: Callable[[Values], Values], seed: int) -> Interval:
    if not len(values):
        return Interval(float("nan"), float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    drawn = []
    for start in range(0, DRAWS, _BLOCK):
        index = rng.integers(0, len(values), (min(_BLOCK, DRAWS - start), len(values)))
        drawn.append(statistic(values[index].mean(axis=1)))
    tail = (1 - _LEVEL) / 2
    several = np.concatenate(drawn)
    known = several[~np.isnan(several)]
    low, high = np.quantile(known, [tail, 1 - tail]) if len(known) else (np.nan, np.nan)
    return Interval(float(statistic(values.mean(axis=0)[None])[0]), float(low), float(high))


__all__ = ["DRAWS", "Interval", "Values", "mean", "ratio"]
