"""MemoryStore: chunks in host memory, the most recently used ones."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Iterable

from kvblend_rag.errors import ChunkMissing
from kvblend_rag.store.base import ChunkStore, StoredChunk
from kvblend_rag.store.layout import checked_key

_SLACK = 1.125


class MemoryStore(ChunkStore):
    """A bounded cache in front of a slower tier: keeping nothing is never an error.

    A chunk larger than the bound is silently not kept; with ``max_bytes`` 0 none is.

    Args:
        max_bytes: bound on the KV held; the least recently used chunks leave first.
        pin: keep page-locked copies, from which a GPU loads asynchronously; needs CUDA.
    """

    name = "memory"

    def __init__(self, max_bytes: int, pin: bool = False) -> None:
        self._max_bytes = max_bytes
        self._pin = pin
        self._chunks: OrderedDict[str, StoredChunk] = OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()

    def put(self, chunk: StoredChunk) -> None:
        """Keep a chunk, if it fits; without a copy unless pinned or part of a larger tensor."""
        checked_key(chunk.key)
        if chunk.kv.nbytes > self._max_bytes:
            self.delete([chunk.key])
            return
        chunk = self._own(chunk)
        with self._lock:
            self._drop(chunk.key)
            self._chunks[chunk.key] = chunk
            self._nbytes += chunk.kv.nbytes
            while self._nbytes > self._max_bytes:
                self._drop(next(iter(self._chunks)))

    def read(self, key: str) -> StoredChunk:
        """A chunk; makes it the most recently used."""
        with self._lock:
            try:
                self._chunks.move_to_end(key)
                return self._chunks[key]
            except KeyError:
                raise ChunkMissing(f"Chunk {key} is not in memory: read it from a slower tier.") from None

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
        """Bytes of KV in memory."""
        with self._lock:
            return self._nbytes

    def close(self) -> None:
        """Forget everything."""
        with self._lock:
            self._chunks.clear()
            self._nbytes = 0

    def _own(self, chunk: StoredChunk) -> StoredChunk:
        if self._pin:
            return dataclasses.replace(chunk, kv=chunk.kv.pin_memory())
        # a small view would keep all of a large tensor alive, unseen by the bound
        if chunk.kv.untyped_storage().nbytes() > _SLACK * chunk.kv.nbytes + 4_096:
            return dataclasses.replace(chunk, kv=chunk.kv.clone())
        return chunk

    def _drop(self, key: str) -> None:
        chunk = self._chunks.pop(key, None)
        if chunk is not None:
            self._nbytes -= chunk.kv.nbytes


__all__ = ["MemoryStore"]
