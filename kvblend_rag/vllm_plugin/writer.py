"""Writer: puts ingested chunks into the store behind the engine's back, a few at a time."""

from __future__ import annotations

import queue
import threading

from kvblend_rag.errors import KVBlendError
from kvblend_rag.store import Catalogue, StoredChunk, TieredStore
from kvblend_rag.store.layout import Shard
from kvblend_rag.store.listing import put_and_list

_WAITING = 8
"""Chunks that may wait to be written before the engine waits for them."""


class Writer:
    """One thread that writes chunks and lists them; what failed is kept until it is asked for.

    Args:
        store: where the tensors go.
        catalogue: where a chunk is listed once its tensors are durable; closed with the writer.
        shard: this worker's (rank, ranks).
    """

    def __init__(self, store: TieredStore, catalogue: Catalogue, shard: Shard) -> None:
        self._store, self._catalogue, self._shard = store, catalogue, shard
        self._queue: queue.Queue[StoredChunk | None] = queue.Queue(_WAITING)
        self._failures: dict[str, str] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="kvblend-writer", daemon=True)
        self._thread.start()

    def write(self, chunk: StoredChunk) -> None:
        """Hand a chunk over; waits while too many are in line."""
        self._queue.put(chunk)

    def flush(self) -> dict[str, str]:
        """Wait until all is durable; the reasons of those chunks that could not be written, by key."""
        self._queue.join()
        with self._lock:
            failures, self._failures = self._failures, {}
        return failures

    def close(self) -> None:
        """Finish what is in line."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
            self._catalogue.close()

    def _work(self) -> None:
        while (chunk := self._queue.get()) is not None:
            try:
                put_and_list(self._store, self._catalogue, [chunk], self._shard)
            except KVBlendError as error:
                self._fail(chunk.key, str(error))
            except Exception as error:  # whatever else goes wrong must not end the thread
                self._fail(chunk.key, f"The chunk could not be written: {error!r}.")
            finally:
                self._queue.task_done()
        self._queue.task_done()

    def _fail(self, key: str, reason: str) -> None:
        with self._lock:
            self._failures[key] = reason


__all__ = ["Writer"]
