"""DiskUsage: how much the chunk files of a store take, and which leaves first."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from kvblend_rag.store.eviction import Eviction, Queue, latest
from kvblend_rag.store.layout import StoreLayout, mark_used

_SCAN_SHARE = 0.02


class _Use(NamedTuple):
    used: int
    """Nanoseconds, the latest modification time of the chunk's files (``eviction``)."""
    nbytes: int


class DiskUsage:
    """Counts the files of all ranks; a chunk is used, and leaves, as a whole.

    The files themselves are the truth. What other processes do is seen by scanning them anew, as often
    as costs 2 % of the time at most (1,600 files: 10 ms, every half second). Not thread-safe.
    """

    def __init__(self, layout: StoreLayout) -> None:
        self._layout = layout
        self.scan()

    @property
    def total(self) -> int:
        """Bytes in chunk files, as known here."""
        return self._total

    def scan(self) -> None:
        """Count every file."""
        began = time.monotonic()
        paths: dict[str, list[Path]] = {}
        for path, key, _ in self._layout.chunk_files():
            paths.setdefault(key, []).append(path)
        uses = {key: _use(files, self._layout.eviction) for key, files in paths.items()}
        self._uses = {key: use for key, use in uses.items() if use is not None}
        self._total = sum(use.nbytes for use in self._uses.values())
        self._queue = Queue()
        for key, use in self._uses.items():
            self._queue.set(key, use.used)
        ended = time.monotonic()
        self._due = ended + (ended - began) / _SCAN_SHARE

    def scan_if_due(self) -> None:
        """Count every file, unless that was done lately."""
        if time.monotonic() >= self._due:
            self.scan()

    def update(self, key: str) -> None:
        """Look at the files of one chunk, which were written, used or deleted."""
        before = self._uses.pop(key, None)
        use = _use(self._layout.files_of(key), self._layout.eviction)
        self._total += (use.nbytes if use else 0) - (before.nbytes if before else 0)
        if use is None:
            self._queue.discard(key)
        else:
            self._uses[key] = use
            self._queue.set(key, use.used)

    def first(self) -> str | None:
        """The chunk that leaves first, as its files tell now."""
        while (key := self._queue.first()) is not None:
            known = self._uses[key].used
            self.update(key)
            if key in self._uses and self._uses[key].used == known:
                return key
        return None


def _use(paths: Iterable[Path], eviction: Eviction) -> _Use | None:
    bound = latest(eviction, time.time_ns())
    times, nbytes = [], 0
    for path in paths:
        with contextlib.suppress(OSError):  # gone meanwhile
            status = path.stat()
            times.append(status.st_mtime_ns)
            nbytes += status.st_size
            if status.st_mtime_ns > bound:  # the clock was wrong once, and it would never grow old
                mark_used(path)
    return _Use(max(times), nbytes) if times else None


__all__ = ["DiskUsage"]
