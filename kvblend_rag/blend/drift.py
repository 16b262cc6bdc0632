"""Drift: how far measured seconds are from predicted ones, by size, as it was lately.

What was measured before the first request is never quite what happens later: other requests run beside, graphs
are replayed, a disk gets busy. The middle of the last few ratios corrects the prediction: a single one counts for
nothing, however large it is, since a kernel that is compiled on its first use takes many times as long.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

_KEPT = 5

_FORGOTTEN = 0.02
"""What a correction loses each time it keeps a request from being tried, so that it is tried again some day."""


@dataclass
class Drift:
    """Ratios of measured to predicted seconds, by power of four of the tokens."""

    _ratios: dict[int, deque[float]] = field(default_factory=dict)

    def observe(self, tokens: float, predicted: float, measured: float) -> None:
        """Take in one measurement.

        Args:
            tokens: its size.
            predicted: seconds, uncorrected.
            measured: seconds.
        """
        if predicted <= 0 or measured <= 0:
            return
        size = _size(tokens)
        if size not in self._ratios:
            self._ratios[size] = deque([self.factor(tokens)], maxlen=_KEPT)
        self._ratios[size].append(measured / predicted)

    def factor(self, tokens: float, unknown: float = 1.0) -> float:
        """By what to multiply a prediction of this size; that of the nearest size known, ``unknown`` where none is."""
        return _middle(self._ratios[self._nearest(tokens)]) if self._ratios else unknown

    def forget(self, tokens: float) -> None:
        """Move this size's correction, or that of the nearest size known, a little towards none."""
        if self._ratios:
            nearest = self._nearest(tokens)
            less = (ratio + _FORGOTTEN * (1.0 - ratio) for ratio in self._ratios[nearest])
            self._ratios[nearest] = deque(less, maxlen=_KEPT)

    def _nearest(self, tokens: float) -> int:
        size = _size(tokens)
        return min(self._ratios, key=lambda known: abs(known - size))


def _middle(ratios: deque[float]) -> float:
    """The median; of two in the middle that nearer to 1."""
    ordered = sorted(ratios)
    half = len(ordered) // 2
    return min(ordered[-half - 1], ordered[half], key=lambda ratio: abs(math.log(ratio)))


def _size(tokens: float) -> int:
    return int(math.log2(max(tokens, 1.0))) // 2


__all__ = ["Drift"]
