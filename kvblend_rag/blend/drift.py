"""Drift: how far measured seconds are from predicted ones, by size, as it was lately.

What was measured before the first request is never quite what happens later: other requests run beside, graphs
are replayed, a disk gets busy. A running average of the ratio corrects the prediction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

_WEIGHT = 0.25
"""Of the newest ratio in the running average."""

_LIMIT = 8.0
"""A single ratio counts as at most so much, or as little: one hiccup is no trend."""

_FORGOTTEN = 0.02
"""What a correction loses each time it keeps a request from being tried, so that it is tried again some day."""


@dataclass
class Drift:
    """Ratios of measured to predicted seconds, by power of four of the tokens."""

    _ratios: dict[int, float] = field(default_factory=dict)

    def observe(self, tokens: float, predicted: float, measured: float) -> None:
        """Take in one measurement.

        Args:
            tokens: its size.
            predicted: seconds, uncorrected.
            measured: seconds.
        """
        if predicted <= 0 or measured <= 0:
            return
        ratio = min(max(measured / predicted, 1 / _LIMIT), _LIMIT)
        size = _size(tokens)
        before = self._ratios.get(size, ratio)
        self._ratios[size] = before + _WEIGHT * (ratio - before)

    def factor(self, tokens: float, unknown: float = 1.0) -> float:
        """By what to multiply a prediction of this size; that of the nearest size known, ``unknown`` where none is."""
        return self._ratios[self._nearest(tokens)] if self._ratios else unknown

    def forget(self, tokens: float) -> None:
        """Move this size's correction, or that of the nearest size known, a little towards none."""
        if self._ratios:
            nearest = self._nearest(tokens)
            self._ratios[nearest] += _FORGOTTEN * (1.0 - self._ratios[nearest])

    def _nearest(self, tokens: float) -> int:
        size = _size(tokens)
        return min(self._ratios, key=lambda known: abs(known - size))


def _size(tokens: float) -> int:
    return int(math.log2(max(tokens, 1.0))) // 2


__all__ = ["Drift"]
