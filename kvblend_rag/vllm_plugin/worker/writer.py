"""Writer: brings ingested chunks to the host and into the store behind the engine's back, a few at a time."""

from __future__ import annotations

import dataclasses
import queue
import threading

import torch

from kvblend_rag.errors import KVBlendError
from kvblend_rag.store import Catalogue, StoredChunk, TieredStore
from kvblend_rag.store.layout import Shard
from kvblend_rag.store.listing import put_and_list

_IN_LINE_BYTES = 1 << 30
"""KV that may be in line, on the device or the host, before the engine waits for it to be written."""

_GPU_THREADS = 8
"""A GPU computes chunks faster than one thread hashes and writes them; a CPU needs its cores for itself."""


class Writer:
    """Threads that write chunks and list them; what failed is kept until it is asked for.

    Args:
        store: where the tensors go.
        catalogue: where a chunk is listed once its tensors are durable; closed with the writer.
        shard: this worker's (rank, ranks).
        device: where the chunks come from.
    """

    def __init__(self, store: TieredStore, catalogue: Catalogue, shard: Shard, device: torch.device) -> None:
        self._store, self._catalogue, self._shard, self._device = store, catalogue, shard, device
        self._queue: queue.SimpleQueue[tuple[StoredChunk, torch.cuda.Event | None] | None] = queue.SimpleQueue()
        self._in_line = 0
        self._failures: dict[str, str] = {}
        self._changed = threading.Condition()
        count = _GPU_THREADS if device.type == "cuda" else 1
        self._threads = [
            threading.Thread(target=self._work, name=f"kvblend-writer-{index}", daemon=True) for index in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def wait_for_room(self, nbytes: int) -> None:
        """Wait until so much more KV may be in line; a chunk larger than all the room waits for an empty line."""
        with self._changed:
            self._changed.wait_for(lambda: not self._in_line or self._in_line + nbytes <= _IN_LINE_BYTES)

    def write(self, chunk: StoredChunk) -> None:
        """Hand a chunk over, whose KV may be the result of work that a GPU has yet to do."""
        ready = None
        if chunk.kv.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        with self._changed:
            self._in_line += chunk.kv.nbytes
        self._queue.put((chunk, ready))

    def flush(self) -> dict[str, str]:
        """Wait until all is durable; the reasons of those chunks that could not be written, by key."""
        with self._changed:
            self._changed.wait_for(lambda: not self._in_line)
            failures, self._failures = self._failures, {}
        return failures

    def close(self) -> None:
        """Finish what is in line."""
        if self._threads:
            for _ in self._threads:
                self._queue.put(None)
            for thread in self._threads:
                thread.join()
            self._threads = []
            self._catalogue.close()

    def _work(self) -> None:
        stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        while (item := self._queue.get()) is not None:
            chunk, ready = item
            key, nbytes, reason = chunk.key, chunk.kv.nbytes, None
            try:
                if ready is not None and stream is not None:
                    chunk = _on_host(chunk, ready, stream)
                put_and_list(self._store, self._catalogue, [chunk], self._shard)
            except KVBlendError as error:
                reason = str(error)
            except Exception as error:  # whatever else goes wrong must not end the thread
                reason = f"The chunk could not be written: {error!r}."
            del item, chunk  # what is not in line any more is not held either
            with self._changed:
                if reason is not None:
                    self._failures[key] = reason
                self._in_line -= nbytes
                self._changed.notify_all()


def _on_host(chunk: StoredChunk, ready: torch.cuda.Event, stream: torch.cuda.Stream) -> StoredChunk:
    """The chunk in page-locked memory, from which it can be loaded as it is."""
    with torch.cuda.stream(stream):
        stream.wait_event(ready)
        host = torch.empty(chunk.kv.shape, dtype=chunk.kv.dtype, pin_memory=True)
        host.copy_(chunk.decoded(), non_blocking=True)
        stream.synchronize()
    return dataclasses.replace(chunk, kv=host)


__all__ = ["Writer"]
