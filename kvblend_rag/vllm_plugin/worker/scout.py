"""Scout: reads chunks beside the engine's work, so that tiers are measured and what is far comes near."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Sequence

from kvblend_rag.errors import StoreError
from kvblend_rag.report import TierLoad
from kvblend_rag.store import Catalogue, TieredStore

_SAMPLES = (1, 3)
"""Chunks of each tier that are read together when an engine starts: two numbers tell a wait from a rate."""

_LOOKED_AT = 16
"""Chunks that are located in order to find these."""

_PATIENCE_SECONDS = 2.0
"""An engine's start waits so long for tiers to be measured; slower ones are known later."""

_BETWEEN_MEASURES_S = 5.0
"""Where what was fetched last came no nearer, reading only tells how fast it goes: one chunk so often is enough."""

_IN_LINE = 4
"""Requests whose chunks wait to be fetched; those of more are let go, somebody will want them again."""


class Scout:
    """One thread that reads.

    Args:
        store: this rank's chunks.
    """

    def __init__(self, store: TieredStore) -> None:
        self._store = store
        self._near = [tier for tier in store.tiers if not tier.remote]
        self._queue: queue.Queue[Sequence[str] | None] = queue.Queue(_IN_LINE)
        self._closed = False
        self._loads: list[TierLoad] = []
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="kvblend-scout", daemon=True)
        self._thread.start()

    def measure(self, catalogue: Catalogue) -> None:
        """Read some stored chunks of each tier; an engine that starts waits a moment for it."""
        worker = threading.Thread(target=self._measure, args=(catalogue.sample(_LOOKED_AT),), daemon=True)
        worker.start()
        worker.join(_PATIENCE_SECONDS)

    def fetch(self, keys: Sequence[str]) -> None:
        """Have a request's chunks read into the fastest tier, unless enough are in line already."""
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(keys)

    def take_loads(self) -> list[TierLoad]:
        """What each reading since the last call took, by tier."""
        with self._lock:
            loads, self._loads = self._loads, []
            return loads

    def close(self) -> None:
        """Let go of what is in line and stop."""
        self._closed = True
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join(_PATIENCE_SECONDS)

    def _work(self) -> None:
        comes_near, last = len(self._store.tiers) > 1, -math.inf
        while (keys := self._queue.get()) is not None and not self._closed:
            if not comes_near and time.monotonic() - last < _BETWEEN_MEASURES_S:
                continue
            keys = keys if comes_near else keys[:1]
            before = [self._depth(key) for key in keys]
            if self._read(keys) and any(before):
                comes_near = any(self._depth(key) < depth for key, depth in zip(keys, before, strict=True))
            last = time.monotonic()

    def _depth(self, key: str) -> int:
        """How many of this machine's tiers would have to be passed to find a chunk; 0: it is as near as can be."""
        return next((depth for depth, tier in enumerate(self._near) if tier.contains(key)), len(self._near))

    def _measure(self, keys: Sequence[str]) -> None:
        found: dict[str, list[str]] = {}
        for key in keys:
            tier = self._store.locate(key)
            if tier is not None:
                found.setdefault(tier, []).append(key)
        for inside in found.values():
            first = 0
            for count in _SAMPLES:
                self._read(inside[first : first + count])
                first += count

    def _read(self, keys: Sequence[str]) -> bool:
        """Read, and tell whether anything was."""
        loads: list[TierLoad] = []
        # Who needs a chunk that can't be read will be told.
        with contextlib.suppress(StoreError):
            self._store.get_many(keys, loads)
        with self._lock:
            self._loads += loads
        return bool(loads)


__all__ = ["Scout"]
