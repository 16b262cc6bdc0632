"""WindowTable: where in which chunk a window of tokens stands, by its hash.

A sorted array is searched in place of a Python dict: an entry costs 16 bytes, not 150, and all
positions of a prompt are looked up at once. Nothing here proves anything: the caller compares tokens.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvblend_rag.blend.chunk import TokenIds

Hashes: TypeAlias = npt.NDArray[np.uint64]
Ints: TypeAlias = npt.NDArray[np.int64]

_BASE = 0x9E3779B97F4A7C15
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_RECENT_LIMIT = 4096
_FILTER_BYTES_PER_ENTRY = 8


def window_hashes(tokens: TokenIds, window: int) -> Hashes:
    """Polynomial hash mod 2^64 of every window of a text.

    Args:
        tokens: int32, shape (tokens,).
        window: tokens in a window, at least 1.

    Returns:
        uint64, shape (tokens - window + 1,), or (0,) for a shorter text; element i is of the window
        that starts at token i.
    """
    count = max(len(tokens) - window + 1, 0)
    hashes = np.zeros(count, np.uint64)
    if not count:
        return hashes
    # by doubling: 4 passes for a window of 16 where Horner's rule takes 16
    part, size, done = tokens.astype(np.uint64), 1, 0
    while True:
        power = np.uint64(pow(_BASE, size, 1 << 64))
        if window & size:
            hashes = hashes * power + part[done : done + count]
            done += size
        if done == window:
            break
        part = part[:-size] * power + part[size:]
        size *= 2
    # the low bits of a polynomial mod 2^64 see only the low bits of the tokens; the filter uses low bits
    hashes ^= hashes >> np.uint64(32)
    hashes *= _MIX
    hashes ^= hashes >> np.uint64(29)
    return hashes


class WindowTable:
    """A multimap from window hash to (slot, offset), sorted by hash.

    New entries go to a small recent part; it is merged into the main part when full, so that one more
    chunk costs microseconds whatever the size of the table.
    """

    def __init__(self) -> None:
        self._main = _empty()
        self._recent = _empty()
        self._filter = np.zeros(1, np.bool_)

    def __len__(self) -> int:
        return len(self._main[0]) + len(self._recent[0])

    def insert(self, hashes: Hashes, slots: Ints, offsets: Ints) -> None:
        """Adds entries; all three of shape (entries,), slots and offsets below 2^31."""
        order = np.argsort(hashes, kind="stable")
        fresh = hashes[order], (slots[order] << 32) | offsets[order]
        self._recent = _merged(self._recent, fresh)
        if len(self._recent[0]) > _RECENT_LIMIT:
            self._main, self._recent = _merged(self._main, self._recent), _empty()
        if len(self) * _FILTER_BYTES_PER_ENTRY > len(self._filter):
            self._rebuild_filter()
        else:
            self._filter[self._filter_index(hashes)] = True

    def purge(self, alive: npt.NDArray[np.bool_]) -> None:
        """Drops every entry of a slot that is not alive; ``alive`` is indexed by slot."""
        everything = _merged(self._main, self._recent)
        keep = alive[everything[1] >> 32]
        self._main, self._recent = (everything[0][keep], everything[1][keep]), _empty()
        self._rebuild_filter()

    def find(self, hashes: Hashes) -> tuple[Ints, Ints, Ints]:
        """The groups of entries with these hashes.

        Returns:
            ``at, low, high``, int64, shape (hits,): ``places(low[i], high[i])`` are the entries whose
            hash is ``hashes[at[i]]``. A hash may hit twice, in the main and in the recent part.
        """
        # 8k random reads of a table this size take 0.1 ms; a binary search for each of them 2 ms
        maybe = np.flatnonzero(self._filter[self._filter_index(hashes)])
        wanted = hashes[maybe]
        found = []
        for (known, _), base in ((self._main, 0), (self._recent, len(self._main[0]))):
            if not len(known):
                continue
            low = np.searchsorted(known, wanted)
            hit = known[np.minimum(low, len(known) - 1)] == wanted
            high = np.searchsorted(known, wanted[hit], side="right")
            found.append((maybe[hit], low[hit] + base, high + base))
        if not found:
            return (np.zeros(0, np.int64),) * 3
        at, low, high = (np.concatenate(column) for column in zip(*found, strict=True))
        return at, low, high

    def places(self, low: int, high: int) -> tuple[Ints, Ints]:
        """Slots and offsets of the entries of one group, int64, shape (high - low,)."""
        part, base = (self._main, 0) if low < len(self._main[0]) else (self._recent, len(self._main[0]))
        places = part[1][low - base : high - base]
        return places >> 32, places & 0x7FFFFFFF

    def _filter_index(self, hashes: Hashes) -> Hashes:
        return hashes & np.uint64(len(self._filter) - 1)

    def _rebuild_filter(self) -> None:
        size = 1 << (2 * _FILTER_BYTES_PER_ENTRY * max(len(self), 1) - 1).bit_length()
        self._filter = np.zeros(size, np.bool_)
        for known, _ in (self._main, self._recent):
            self._filter[self._filter_index(known)] = True


def _empty() -> tuple[Hashes, Ints]:
    return np.zeros(0, np.uint64), np.zeros(0, np.int64)


def _merged(old: tuple[Hashes, Ints], new: tuple[Hashes, Ints]) -> tuple[Hashes, Ints]:
    if not len(old[0]):
        return new
    at = np.searchsorted(old[0], new[0], side="right")
    return np.insert(old[0], at, new[0]), np.insert(old[1], at, new[1])


__all__ = ["WindowTable", "window_hashes"]
