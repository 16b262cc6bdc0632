"""Readings: how fast a tier is read, as it was lately."""

from __future__ import annotations

from collections import deque

import numpy as np

from kvblend_rag.blend.cost import ReadPace, fit_nonnegative

_KEPT = 16
_DECAY = 0.8
"""Of an observation's weight with each that follows it."""


class Readings:
    """The last observations of one tier, and the pace that they tell."""

    def __init__(self) -> None:
        self._seen: deque[tuple[int, int, float]] = deque(maxlen=_KEPT)
        self._pace: ReadPace | None = None

    def observe(self, reads: int, nbytes: int, seconds: float) -> None:
        """Take in some reads.

        Args:
            reads: how many waited for one another.
            nbytes: of all together.
            seconds: of all together.
        """
        if reads > 0 and seconds > 0:
            self._seen.append((reads, nbytes, seconds))
            self._pace = None

    def pace(self) -> ReadPace | None:
        """The tier's pace; None before the first observation."""
        if self._pace is None and self._seen:
            weights = np.array([_DECAY**age for age in range(len(self._seen))][::-1])
            features = np.array([[reads, nbytes] for reads, nbytes, _ in self._seen], dtype=float)
            seconds = np.array([each for *_, each in self._seen])
            self._pace = ReadPace(*fit_nonnegative(features, seconds, weights))
        return self._pace


__all__ = ["Readings"]
