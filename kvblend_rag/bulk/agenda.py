"""Agenda: which rows of a feed count: of several with one id the last, and none that is done already."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Agenda:
    """What is left to do of a feed. Engines work side by side, so the order of its rows is settled before."""

    total: int
    """Rows to be done."""
    superseded: int
    """Rows that a later one with the same id replaces."""
    settled: int
    """Rows that an interrupted run has dealt with."""
    done: Hashes
    """Their digests, sorted."""
    several: Hashes
    """Ids, as hashes, that stand in several rows, sorted."""
    last: Hashes
    """By these: the digest of the last row."""

    @classmethod
    def of(cls, ids: Hashes, digests: Hashes, done: Hashes) -> Agenda:
        """From the rows' id hashes and digests, in the feed's order, each of shape (rows,)."""
        own, behind, count = np.unique(ids[::-1], return_index=True, return_counts=True)
        several, last = own[count > 1], digests[::-1][behind[count > 1]]
        agenda = cls(0, 0, 0, np.unique(done), several, last)
        counts, total = agenda._counts(ids, digests), int(agenda.wanted(ids, digests).sum())
        return replace(agenda, total=total, superseded=int((~counts).sum()), settled=int(counts.sum()) - total)

    def wanted(self, ids: Hashes, digests: Hashes) -> npt.NDArray[np.bool_]:
        """Which rows are to be done, bool of shape (rows,); equal rows of one id all are, which does no harm."""
        return self._counts(ids, digests) & ~_among(digests, self.done)[0]

    def _counts(self, ids: Hashes, digests: Hashes) -> npt.NDArray[np.bool_]:
        found, place = _among(ids, self.several)
        is_last = np.ones(len(ids), dtype=bool)
        is_last[found] = digests[found] == self.last[place[found]]
        return is_last


def _among(values: Hashes, ordered: Hashes) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.intp]]:
    """Which values are in a sorted array, and where."""
    if not len(ordered):
        return np.zeros(len(values), dtype=bool), np.zeros(len(values), dtype=np.intp)
    place = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return ordered[place] == values, place


__all__ = ["Agenda", "Hashes"]
