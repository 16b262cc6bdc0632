"""MemoryStore: chunks in host memory, as many as there is room for."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterable

from kvblend_rag.errors import ChunkMissing
from kvblend_rag.store.base import ChunkStore, StoredChunk
from kvblend_rag.store.encoded import buffer_of, in_buffer
from kvblend_rag.store.eviction import Eviction, Queue, after_use
from kvblend_rag.store.layout import checked_key
from kvblend_rag.store.page_locking import Spare, locked_bytes

_SLACK = 1.125

_SPARE, _LEAST_SPARE = 8, 2 << 30
"""Of page-locked memory, this part of the bound may lie free until a chunk of its size comes, and so many bytes in any
case: what is on its way here while chunks are ingested is told from what is free by nothing but its size."""


class MemoryStore(ChunkStore):
    """A bounded cache in front of a slower tier: keeping nothing is never an error.

    A chunk larger than the bound is silently not kept; with ``max_bytes`` 0 none is.

    Args:
        max_bytes: bound on the memory that the KV takes, encoded where it is.
        pin: keep page-locked copies, from which a GPU loads asynchronously; needs CUDA.
        eviction: which chunks leave first.
    """

    name = "memory"

    def __init__(self, max_bytes: int, pin: bool = False, eviction: Eviction = "lru") -> None:
        self._max_bytes = max_bytes
        self._pin = pin
        self._spare = Spare(max(max_bytes // _SPARE, _LEAST_SPARE))
        self._eviction = eviction
        self._chunks: dict[str, StoredChunk] = {}
        self._order = Queue()
        self._last = 0
        self._nbytes = 0
        self._lock = threading.Lock()
        self._changes: dict[str, bool] = {}

    def put(self, chunk: StoredChunk) -> None:
        """Keep a chunk, if it fits; without a copy unless pinned or part of a larger tensor."""
        checked_key(chunk.key)
        nbytes = self._taken_by(chunk)
        if nbytes > self._max_bytes:
            self.delete([chunk.key])
            return
        chunk = self._own(chunk)
        with self._lock:
            used = self._order.number(chunk.key)
            self._drop(chunk.key)
            # room first: with LFU what comes would be the first to leave
            while self._nbytes + nbytes > self._max_bytes and (first := self._order.first()) is not None:
                self._drop(first)
            self._chunks[chunk.key] = chunk
            self._order.set(chunk.key, self._now() if used is None or self._eviction == "lru" else used)
            self._changes[chunk.key] = True
            self._nbytes += nbytes
            ours = self._nbytes
        if self._pin:
            self._spare.bound(ours)  # not under the lock: giving back gigabytes takes a while

    def read(self, key: str) -> StoredChunk:
        """A chunk; counts a use."""
        with self._lock:
            number = self._order.number(key)
            if number is None:
                raise ChunkMissing(f"Chunk {key} is not in memory: read it from a slower tier.")
            self._order.set(key, after_use(self._eviction, number, self._now()))
            return self._chunks[key]

    def contains(self, key: str) -> bool:
        """Whether the chunk is in memory."""
        with self._lock:
            return key in self._chunks

    def delete(self, keys: Iterable[str]) -> None:
        """Forget chunks; a tensor handed out before stays valid."""
        with self._lock:
            for key in keys:
                self._drop(key)

    def nbytes(self) -> int:
        """Bytes of memory that the KV takes, encoded where it is."""
        with self._lock:
            return self._nbytes

    def take_changes(self) -> dict[str, bool]:
        """Keys that came (True) or went (False) since the last call."""
        with self._lock:
            changes, self._changes = self._changes, {}
            return changes

    def close(self) -> None:
        """Forget everything."""
        with self._lock:
            self._chunks.clear()
            self._order = Queue()
            self._nbytes = 0

    def _taken_by(self, chunk: StoredChunk) -> int:
        return locked_bytes(chunk.kv.nbytes) if self._pin else chunk.kv.nbytes

    def _own(self, chunk: StoredChunk) -> StoredChunk:
        if self._pin:
            return dataclasses.replace(chunk, kv=chunk.kv.pin_memory())
        # a small view would keep all of a large tensor alive, unseen by the bound
        held = buffer_of(chunk.kv)
        if held.untyped_storage().nbytes() > _SLACK * held.nbytes + 4_096:
            return dataclasses.replace(chunk, kv=in_buffer(chunk.kv, held.clone()))
        return chunk

    def _now(self) -> int:
        self._last = max(time.time_ns(), self._last + 1)  # no two uses are at one time
        return self._last

    def _drop(self, key: str) -> None:
        chunk = self._chunks.pop(key, None)
        self._order.discard(key)
        if chunk is not None:
            self._nbytes -= self._taken_by(chunk)
            self._changes[key] = False


__all__ = ["MemoryStore"]
