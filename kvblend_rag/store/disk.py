"""DiskStore: chunks as files, durable, bounded, shared by any number of processes."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterable
from pathlib import Path

from kvblend_rag.errors import ChunkDamaged, ChunkMissing, StoreError, StoreFull
from kvblend_rag.store.base import ChunkStore, StoredChunk
from kvblend_rag.store.catalogue import Catalogue
from kvblend_rag.store.chunk_file import as_stored, encode_chunk, read_chunk, write_chunk
from kvblend_rag.store.layout import Shard, StoreLayout, mark_used, store_error
from kvblend_rag.store.usage import DiskUsage


class DiskStore(ChunkStore):
    """One rank's view of the chunk files under ``root``.

    Chunks leave when the bound is reached, as the layout's ``eviction`` says, with the files of all ranks. Whatever
    leaves loses its catalogue row first; a row is never added here: that is for whoever ingests, after
    ``put`` has returned.

    Args:
        root: the store's folder; created when missing.
        shard: tensor-parallel (rank, size).
        max_bytes: bound on the files of all ranks together; None: the device's.
        catalogue: of the same root, and closed with this store; None: nobody lists these chunks.

    Raises:
        StoreError: the folder can't be made.
    """

    name = "disk"

    def __init__(
        self,
        root: str | Path | StoreLayout,
        *,
        shard: Shard = (0, 1),
        max_bytes: int | None = None,
        catalogue: Catalogue | None = None,
    ) -> None:
        self._layout = StoreLayout.of(root)
        self._layout.create()
        self._shard = shard
        self._max_bytes = max_bytes
        self._catalogue = catalogue
        self._usage = DiskUsage(self._layout)
        self._usage_lock = threading.Lock()

    def put(self, chunk: StoredChunk) -> None:
        """Write a chunk, durable when this returns; others may leave for it."""
        path = self._layout.chunk_path(chunk.key, self._shard)
        parts = encode_chunk(self._layout, chunk, self._shard)
        nbytes = sum(map(len, parts))
        if self._max_bytes is not None and nbytes > self._max_bytes:
            raise StoreFull(
                f"A chunk file of {nbytes:,} bytes doesn't fit into a store of {self._max_bytes:,}: raise max_disk_gb."
            )
        self._shrink(room=nbytes)
        write_chunk(self._layout, path, parts)
        with self._usage_lock:
            self._usage.update(chunk.key)
        self._shrink()  # again, for what others wrote meanwhile

    def read(self, key: str) -> StoredChunk:
        """A chunk, verified. One that is damaged or gone loses its row; a damaged file is put aside."""
        path = self._layout.chunk_path(key, self._shard)
        try:
            chunk = read_chunk(self._layout, path, key, self._shard)
        except (ChunkMissing, ChunkDamaged) as error:
            chunk = self._read_again(key, path, error)
        self.touch(key)
        return chunk

    def contains(self, key: str) -> bool:
        """Whether this rank's file is there."""
        return self._layout.chunk_path(key, self._shard).is_file()

    def as_stored(self, chunk: StoredChunk) -> StoredChunk:
        """The chunk as its file will give it."""
        return as_stored(self._layout, chunk)

    def keeps(self, key: str) -> bool:
        """Whether this rank's file is there, and no eviction that began before will take it."""
        with self._layout.lock():
            return self.contains(key)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete the files of all ranks, after the chunks' rows."""
        self._delete(list(keys), unless_held=False)

    def delete_unheld(self, keys: Iterable[str]) -> list[str]:
        """Delete those of the chunks that no document in the catalogue holds; returns their keys."""
        return self._delete(list(keys), unless_held=True)

    def touch(self, key: str) -> None:
        """Count a use."""
        with contextlib.suppress(OSError):  # just deleted, or a read-only store: still readable
            mark_used(self._layout.chunk_path(key, self._shard), self._layout.eviction)

    def nbytes(self) -> int:
        """Bytes in chunk files of all ranks and processes, counted now."""
        with self._usage_lock:
            self._usage.scan()
            return self._usage.total

    def evict(self, max_bytes: int) -> list[str]:
        """Let chunks leave, until the rest fits; returns their keys."""
        with self._usage_lock:
            self._usage.scan()
        return self._evict(max_bytes)

    def close(self) -> None:
        """Close the catalogue."""
        if self._catalogue is not None:
            self._catalogue.close()

    def _shrink(self, room: int = 0) -> None:
        if self._max_bytes is not None:
            with self._usage_lock:
                self._usage.scan_if_due()
            self._evict(self._max_bytes - room)

    def _evict(self, max_bytes: int) -> list[str]:
        gone = []
        with self._usage_lock:
            while self._usage.total > max_bytes:
                # under the lock: nobody renews the first between our look and its end
                with self._layout.lock():
                    key = self._usage.first()
                    if key is None or self._usage.total <= max_bytes:  # some had gone already
                        break
                    self._remove([key])
                self._usage.update(key)
                gone.append(key)
        return gone

    def _delete(self, keys: list[str], unless_held: bool) -> list[str]:
        with self._layout.lock():
            keys = self._remove(keys, unless_held)
        with self._usage_lock:
            for key in keys:
                self._usage.update(key)
        return keys

    def _remove(self, keys: list[str], unless_held: bool = False) -> list[str]:
        if self._catalogue is None:
            self._unlink(keys)
            return keys
        try:
            keys = self._catalogue.remove(keys, unless_held=unless_held)
        except StoreFull:
            # dropping a row takes room too: on a full device the files go first, or nothing ever could
            held = self._catalogue.held(keys) if unless_held else set()
            keys = [key for key in keys if key not in held]
            self._unlink(keys)
            return self._catalogue.remove(keys)
        self._unlink(keys)
        return keys

    def _unlink(self, keys: list[str]) -> None:
        for path in itertools.chain.from_iterable(map(self._layout.files_of, keys)):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise store_error(error, path, "deleted") from error

    def _read_again(self, key: str, path: Path, error: ChunkMissing | ChunkDamaged) -> StoredChunk:
        try:
            with self._layout.lock():
                # a writer may have renewed it since, and then neither its file nor its row may go
                try:
                    return read_chunk(self._layout, path, key, self._shard)
                except (ChunkMissing, ChunkDamaged) as again:
                    error = again
                if self._catalogue is not None:
                    self._catalogue.remove([key])
                if isinstance(error, ChunkDamaged):
                    self._layout.put_aside(path)
        except (StoreError, OSError):
            raise error from None  # a store we can't write to: the reader still learns what is wrong
        raise error


__all__ = ["DiskStore"]
