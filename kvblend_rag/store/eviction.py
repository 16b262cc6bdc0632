"""Eviction: which chunk leaves a full tier first, the one used longest ago (LRU) or the one used least often (LFU).

Both compare one number a chunk, a time in nanoseconds, so that a file's time of modification can carry it. With LFU
each use is worth a day: a chunk is as young as its age less its uses in days, so what was popular once leaves some
day, and a scan over the whole store makes nothing popular leave (LFU with ageing, as in Arlitt et al., "Evaluating
content management techniques for web proxy caches", 2000).
"""

from __future__ import annotations

import heapq
from typing import Literal, TypeAlias

Eviction: TypeAlias = Literal["lru", "lfu"]

_A_USE_NS = 86_400 * 10**9
_MOST_NS = 365 * _A_USE_NS
_CLOCK_NS = 60 * 10**9


def after_use(eviction: Eviction, before: int, now: int) -> int:
    """A chunk's number after one more use; all are nanoseconds of the system's clock.

    Args:
        eviction: how numbers are made.
        before: its number so far.
        now: the time.
    """
    return now if eviction == "lru" else min(max(before, now - _MOST_NS) + _A_USE_NS, now + _MOST_NS)


def latest(eviction: Eviction, now: int) -> int:
    """The largest number that can be right; a larger one is of a clock that was wrong."""
    return now + (_CLOCK_NS if eviction == "lru" else _MOST_NS + _CLOCK_NS)


class Queue:
    """Keys in the order in which they leave, by numbers that mostly grow; not thread-safe."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._heap: list[tuple[int, str]] = []
        self._queued: dict[str, int] = {}  # the number under which a key stands in the heap; others there are stale

    def number(self, key: str) -> int | None:
        """A key's number; None for one that is not here."""
        return self._numbers.get(key)

    def set(self, key: str, number: int) -> None:
        """Add a key, or give it another number."""
        self._numbers[key] = number
        if number < self._queued.get(key, number + 1):
            self._push(key, number)

    def discard(self, key: str) -> None:
        """Take a key out, if it is here."""
        self._numbers.pop(key, None)

    def first(self) -> str | None:
        """The key with the smallest number."""
        while self._heap:
            queued, key = self._heap[0]
            number = self._numbers.get(key)
            if queued == number == self._queued.get(key):
                return key
            heapq.heappop(self._heap)
            if queued == self._queued.get(key):
                del self._queued[key]
                if number is not None:  # it grew since
                    self._push(key, number)
        return None

    def _push(self, key: str, number: int) -> None:
        self._queued[key] = number
        heapq.heappush(self._heap, (number, key))


__all__ = ["Eviction", "Queue", "after_use", "latest"]
