"""ChunkIndex: finds stored chunks anywhere in a prompt.

Windows of each chunk are looked up by hash; a hit is verified token by token and extended to both sides
as far as the tokens agree. No separators and no cooperation from the client are needed: what tokenises
differently where a chunk meets its neighbours simply stays outside the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from kvblend_rag.blend.chunk import TokenIds, as_token_ids
from kvblend_rag.blend.windows import Hashes, Ints, WindowTable, window_hashes
from kvblend_rag.errors import ChunkRejected

_STRIDE = 32
"""Tokens between two indexed windows: a part of stride + window - 1 intact tokens is always found."""

_CANDIDATES = 16
"""Chunks with the same window that are compared; a window shared by more is looked at last."""

_SCAN = 1024
"""Entries of one window that are looked through for chunks still there."""

_COMPARISONS = 512
"""Comparisons allowed for any prompt, and one more a window of it (7 ms in all for 8k tokens): a run
missed costs its prefill, an endless search more. Only many near-copies of one text come near the bound."""

_BATCH = 512


@dataclass(frozen=True, slots=True)
class Match:
    """A run of a stored chunk's tokens that stands in a prompt, verified token by token.

    ``prompt[start:start + length] == chunk[chunk_start:chunk_start + length]``
    """

    key: str
    start: int
    chunk_start: int
    length: int
    behind: int | None = None
    """Tokens of the context that its KV was computed behind; None: the ingest context's."""
    exact: bool = False
    """It stands behind the very tokens that its KV was computed behind: the KV is a full prefill's."""

    @property
    def stop(self) -> int:
        """The first prompt position behind the run."""
        return self.start + self.length


class ChunkIndex:
    """The token ids of all stored chunks, searchable. For one thread at a time."""

    def __init__(self, window: int = 16, offset: int = 2) -> None:
        """Args: tokens in an indexed window; tokens left out at each end of a chunk."""
        if window < 1 or offset < 0:
            raise ValueError(f"window is {window} and offset {offset}; they must be at least 1 and 0.")
        self.window = window
        self.offset = offset
        self._slots: dict[str, int] = {}
        self._chunks: list[tuple[str, TokenIds] | None] = []
        self._alive = np.zeros(0, np.bool_)
        self._free: list[int] = []
        self._dead: list[int] = []
        self._windows = WindowTable()

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, key: str) -> bool:
        return key in self._slots

    def add(self, key: str, token_ids: Sequence[int] | npt.NDArray[np.integer]) -> None:
        """Makes a chunk findable; a key that is already there is replaced.

        Raises:
            ChunkRejected: the chunk is shorter than the window.
        """
        self.add_many([(key, token_ids)])

    def add_many(self, chunks: Iterable[tuple[str, Sequence[int] | npt.NDArray[np.integer]]]) -> None:
        """Makes chunks findable, all or none; many at once are cheaper than one by one.

        Raises:
            ChunkRejected: a chunk is shorter than the window.
        """
        # a dict: the last of two with the same key counts; a copy: the caller may write to its own
        given = {key: np.array(tokens, dtype=np.int32) for key, tokens in chunks}
        for key, tokens in given.items():
            if len(tokens) < self.window:
                raise ChunkRejected(f"Chunk {key} has {len(tokens)} tokens; finding one again takes {self.window}.")
        if not given:
            return
        slots = np.array([self._place(key, tokens) for key, tokens in given.items()], np.int64)
        offsets = [_window_offsets(len(tokens), self.window, self.offset) for tokens in given.values()]
        hashes = _hashes_at(list(given.values()), offsets, self.window)
        counts = [len(at) for at in offsets]
        self._windows.insert(hashes, np.repeat(slots, counts), np.concatenate(offsets))

    def tokens(self, key: str) -> TokenIds:
        """A chunk's token ids.

        Raises:
            KeyError: an unknown key.
        """
        chunk = self._chunks[self._slots[key]]
        assert chunk is not None
        return chunk[1]

    def discard(self, key: str) -> None:
        """Forgets a chunk; an unknown key is no error."""
        slot = self._slots.pop(key, None)
        if slot is None:
            return
        self._chunks[slot] = None
        self._alive[slot] = False
        self._dead.append(slot)
        # the windows of dead chunks are dropped together, when they are a fifth of all
        if len(self._dead) > 64 + len(self._slots) // 4:
            self._windows.purge(self._alive)
            self._free += self._dead
            self._dead = []

    def match(self, prompt: Sequence[int] | npt.NDArray[np.integer], min_run: int = 16) -> list[Match]:
        """Runs of stored chunks in a prompt, sorted, none overlapping another.

        Where two runs overlap, the longer keeps its length and the other the longest part that is left,
        if that is long enough. A run contains at least one whole window of its chunk.

        Args:
            prompt: token ids, int32, shape (tokens,).
            min_run: shorter runs are left out, in tokens.
        """
        tokens = as_token_ids(prompt)
        at, low, high = self._windows.find(window_hashes(tokens, self.window))
        if not len(at):
            return []
        # rare windows first: they lead straight to the right chunk among many with the same opening
        order = np.lexsort((at, high - low > _CANDIDATES))
        covered = bytearray(len(tokens))
        runs: list[Match] = []
        left = _COMPARISONS + len(tokens) // self.window
        for where, first, last in zip(*(column[order].tolist() for column in (at, low, high)), strict=True):
            # whatever else matches here could stick out of the known run by less than a stride
            if covered[where] and covered[where + self.window - 1]:
                continue
            run = self._longest(tokens, where, first, last)
            if run:
                runs.append(run)
                covered[run.start : run.stop] = b"\1" * run.length
            left -= min(last - first, _CANDIDATES)
            if left <= 0:
                break
        return _without_overlaps([run for run in runs if run.length >= min_run], len(tokens), min_run)

    def _longest(self, prompt: TokenIds, at: int, low: int, high: int) -> Match | None:
        """The longest verified run around the window at ``prompt[at]``, of the chunks in one group."""
        slots, offsets = self._windows.places(low, min(high, low + _SCAN))
        alive = np.flatnonzero(self._alive[slots])[:_CANDIDATES]
        found = []
        for slot, offset in zip(slots[alive].tolist(), offsets[alive].tolist(), strict=True):
            chunk = self._chunks[slot]
            assert chunk is not None
            run = _run_around(prompt, at, chunk[0], chunk[1], offset)
            # equal hashes of different windows end here
            if run.stop - at >= self.window:
                found.append(run)
        # of equals the last to start: the search goes from left to right, and what is before is known
        return min(found, key=lambda run: (-run.length, -run.start, run.key), default=None)

    def _place(self, key: str, tokens: TokenIds) -> int:
        self.discard(key)
        tokens.flags.writeable = False
        if self._free:
            slot = self._free.pop()
            self._chunks[slot] = (key, tokens)
        else:
            slot = len(self._chunks)
            self._chunks.append((key, tokens))
            if slot == len(self._alive):
                self._alive = np.resize(self._alive, max(64, 2 * slot))
        self._alive[slot] = True
        self._slots[key] = slot
        return slot


@lru_cache(maxsize=4096)
def _window_offsets(length: int, window: int, offset: int) -> Ints:
    """Where the indexed windows of a chunk start: near both ends and every stride between."""
    last = length - window - offset
    # too short to leave out both ends: whichever end is intact must do
    if last < offset:
        return np.arange(length - window + 1)
    return np.array([*range(offset, last, _STRIDE), last], np.int64)


def _hashes_at(chunks: list[TokenIds], offsets: list[Ints], window: int) -> Hashes:
    """Hashes of the windows of each chunk at its offsets, one after the other."""
    hashes = []
    # one call for many chunks is 20 times faster than one a chunk; batches bound the memory
    for begin in range(0, len(chunks), _BATCH):
        batch, at = chunks[begin : begin + _BATCH], offsets[begin : begin + _BATCH]
        starts = np.cumsum([0, *(len(chunk) for chunk in batch[:-1])])
        wanted = np.concatenate(at) + np.repeat(starts, [len(o) for o in at])
        hashes.append(window_hashes(np.concatenate(batch), window)[wanted])
    return np.concatenate(hashes)


def _run_around(prompt: TokenIds, at: int, key: str, chunk: TokenIds, offset: int) -> Match:
    """The longest run through ``prompt[at]`` and ``chunk[offset]``; its length may be 0."""
    ahead = _agreeing(prompt[at:], chunk[offset:])
    behind = _agreeing(prompt[:at][::-1], chunk[:offset][::-1])
    return Match(key, at - behind, offset - behind, behind + ahead)


def _agreeing(one: TokenIds, other: TokenIds) -> int:
    shared = min(len(one), len(other))
    differs = one[:shared] != other[:shared]
    first = int(differs.argmax()) if shared else 0
    return first if shared and differs[first] else shared


def _preference(run: Match) -> tuple[int, int, str, int]:
    return -run.length, run.start, run.key, run.chunk_start


def _without_overlaps(runs: list[Match], prompt_tokens: int, min_run: int) -> list[Match]:
    taken = np.zeros(prompt_tokens, np.bool_)
    kept = []
    for run in sorted(runs, key=_preference):
        skip, length = 0, run.length
        if taken[run.start : run.stop].any():
            skip, length = _longest_gap(taken[run.start : run.stop])
        if length >= max(min_run, 1):
            kept.append(Match(run.key, run.start + skip, run.chunk_start + skip, length))
            taken[run.start + skip : run.start + skip + length] = True
    return sorted(kept, key=lambda run: run.start)


def _longest_gap(taken: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """Start and length of the longest stretch that is not taken."""
    edges = np.flatnonzero(np.diff(taken, prepend=True, append=True))
    starts, stops = edges[::2], edges[1::2]
    if not len(starts):
        return 0, 0
    best = int((stops - starts).argmax())
    return int(starts[best]), int(stops[best] - starts[best])


__all__ = ["ChunkIndex", "Match"]
