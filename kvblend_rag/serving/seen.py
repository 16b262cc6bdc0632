"""RepeatSketch: finds token runs that come again and again in prompts, in a table of fixed size.

Windows of 16 tokens are counted by hash, once a prompt. A run of windows that were all seen in enough prompts is a
repeated text; where one ends and another begins, the windows across the seam are of this prompt alone, so the run ends
there by itself: no separator is needed. What only ever stood at one position is left to vLLM's prefix cache.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from blake3 import blake3

from kvblend_rag.blend.chunk import TokenIds
from kvblend_rag.blend.windows import window_hashes

WINDOW = 16
"""As in ``blend.match``: what is shorter can't be found again."""

SHORTEST = 64
"""Tokens of a run worth a chunk of its own."""

_GAP = 3
"""Windows that may lack in a run: their slots went to others. Across a seam 15 do, less what the two sides share."""

_SLOTS = 1 << 20
"""15 MiB; a window that meets another in its slot wears its count down, so what is rare makes room for what is not."""


class RepeatSketch:
    """Counts of windows over the prompts of all tenants, each tenant's apart.

    Args:
        times: in how many prompts a window must have stood.
        slots: size of the table, a power of two.
    """

    def __init__(self, times: int, slots: int = _SLOTS) -> None:
        self._times, self._mask = times, np.uint64(slots - 1)
        self._hashes = np.zeros(slots, np.uint64)
        self._counts = np.zeros(slots, np.uint16)
        self._places = np.zeros(slots, np.int32)
        self._moved = np.zeros(slots, np.bool_)

    def observe(self, tenant: str, tokens: TokenIds, known: Iterable[tuple[int, int]] = ()) -> list[tuple[int, int]]:
        """Count a prompt's windows.

        Args:
            tenant: whose prompt it is.
            tokens: int32, shape (tokens,).
            known: ranges ``[start, stop)`` that are stored already.

        Returns:
            Ranges ``[start, stop)`` of the prompt, in order, that have stood in ``times`` prompts now, at different
            positions.
        """
        hashes = window_hashes(tokens, WINDOW) ^ _of_tenant(tenant)
        fresh = np.ones(len(hashes), np.bool_)
        for start, stop in known:
            fresh[max(start - WINDOW + 1, 0) : stop] = False
        places = np.flatnonzero(fresh)
        if not len(places):
            return []
        distinct, first = np.unique(hashes[places], return_index=True)
        self._count(distinct, places[first])
        slots = (hashes & self._mask).astype(np.int64)
        repeated = fresh & (self._hashes[slots] == hashes) & (self._counts[slots] >= self._times)
        return [
            (start, stop + WINDOW - 1)
            for start, stop in _runs(repeated)
            if stop - start + WINDOW - 1 >= SHORTEST and self._moved[slots[start:stop]].mean() > 0.5
        ]

    def _count(self, hashes: np.ndarray, places: np.ndarray) -> None:
        slots = (hashes & self._mask).astype(np.int64)
        same = self._hashes[slots] == hashes
        old, other = slots[same], slots[~same]
        self._counts[old] = np.minimum(self._counts[old], np.iinfo(np.uint16).max - 1) + 1
        self._moved[old] |= self._places[old] != places[same]
        self._counts[other] = np.maximum(self._counts[other], 1) - 1
        empty = self._counts[other] == 0
        taken = other[empty]
        self._hashes[taken], self._counts[taken] = hashes[~same][empty], 1
        self._places[taken], self._moved[taken] = places[~same][empty], False


def _of_tenant(tenant: str) -> np.uint64:
    return np.uint64(int.from_bytes(blake3(tenant.encode()).digest(8), "little") if tenant else 0)


def _runs(marks: np.ndarray) -> list[tuple[int, int]]:
    """Ranges ``[start, stop)`` of marks, over gaps of a few."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], marks, [False])).astype(np.int8)))
    runs: list[tuple[int, int]] = []
    for start, stop in edges.reshape(-1, 2).tolist():
        if runs and start - runs[-1][1] <= _GAP:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((start, stop))
    return runs


__all__ = ["SHORTEST", "WINDOW", "RepeatSketch"]
