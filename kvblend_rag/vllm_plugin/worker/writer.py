"""Writer: brings ingested chunks to the host and into the store behind the engine's back, a few at a time."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable

import torch

from kvblend_rag.errors import KVBlendError
from kvblend_rag.store import Catalogue, StoredChunk, TieredStore
from kvblend_rag.store.encoded import buffer_of, encoded, in_buffer
from kvblend_rag.store.encoding import Encoding
from kvblend_rag.store.layout import Shard
from kvblend_rag.store.listing import put_and_list

_DEVICE_BYTES = 1 << 30
"""KV that may lie on a GPU beside its cache, until it is on the host."""

_LINE_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30}
"""KV that may be in line, by device type, before the engine waits for it to be written. Of an 8B model a GPU computes
1 GiB in a step: with room for the next ones it does not wait for the last."""

_GPU_THREADS = 8
"""A GPU computes chunks faster than one thread hashes and writes them; a CPU needs its cores for itself."""


class Writer:
    """Threads that write chunks and list them; what failed is kept until it is asked for.

    Args:
        store: where the tensors go.
        catalogue: where a chunk is listed once its tensors are durable; closed with the writer.
        shard: this worker's (rank, ranks).
        device: where the chunks come from.
        encoding: in which they leave a GPU, on which that takes least.
    """

    def __init__(
        self, store: TieredStore, catalogue: Catalogue, shard: Shard, device: torch.device, encoding: Encoding = "none"
    ) -> None:
        self._store, self._catalogue, self._shard, self._device = store, catalogue, shard, device
        self._encoding = encoding
        self._on_device: queue.SimpleQueue[tuple[StoredChunk, torch.cuda.Event] | None] = queue.SimpleQueue()
        self._on_host: queue.SimpleQueue[StoredChunk | None] = queue.SimpleQueue()
        self._device_bytes = self._line_bytes = 0
        self._most = _LINE_BYTES.get(device.type, _LINE_BYTES["cpu"])
        self._failures: dict[str, str] = {}
        self._changed = threading.Condition()
        gpu = device.type == "cuda"
        # One thread copies: page-locking and copies come one after the other anyway.
        self._copier = _threads(self._copy, "kvblend-copier", int(gpu))
        self._writers = _threads(self._write, "kvblend-writer", _GPU_THREADS if gpu else 1)

    def wait_for_room(self, nbytes: int) -> None:
        """Wait until so much more KV may be in line; a chunk larger than all the room waits for an empty line."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    not self._line_bytes
                    or (self._line_bytes + nbytes <= self._most and self._device_bytes + nbytes <= _DEVICE_BYTES)
                )
            )

    def write(self, chunk: StoredChunk) -> None:
        """Hand a chunk over, whose KV may be the result of work that a GPU has yet to do."""
        nbytes = chunk.kv.nbytes
        with self._changed:
            self._line_bytes += nbytes
            self._device_bytes += nbytes if chunk.kv.is_cuda else 0
        if chunk.kv.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
            self._on_device.put((chunk, ready))
        else:
            self._on_host.put(chunk)

    def flush(self) -> dict[str, str]:
        """Wait until all is durable; the reasons of those chunks that could not be written, by key."""
        with self._changed:
            self._changed.wait_for(lambda: not self._line_bytes)
            failures, self._failures = self._failures, {}
        return failures

    def close(self) -> None:
        """Finish what is in line."""
        if self._writers:
            for line, threads in ((self._on_device, self._copier), (self._on_host, self._writers)):
                for _ in threads:
                    line.put(None)
                for thread in threads:
                    thread.join()
            self._copier, self._writers = [], []
            self._catalogue.close()

    def _copy(self) -> None:
        """Bring chunks from the device to page-locked memory, from which they can be loaded as they are."""
        stream = torch.cuda.Stream(self._device)
        while (item := self._on_device.get()) is not None:
            chunk, ready = item
            key, nbytes = chunk.key, chunk.kv.nbytes
            try:
                with torch.cuda.stream(stream):
                    stream.wait_event(ready)
                    kv = encoded(chunk.decoded(), self._encoding)
                    source = buffer_of(kv)
                    host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
                    host.copy_(source, non_blocking=True)
                    stream.synchronize()
                stored = dataclasses.replace(chunk, kv=in_buffer(kv, host))
                with self._changed:
                    self._line_bytes -= nbytes - host.nbytes
                self._on_host.put(stored)
                del kv, source, host, stored
            except Exception as error:  # whatever goes wrong must not end the thread
                self._leaves(key, nbytes, f"The chunk could not be copied to the host: {error!r}.")
            del item, chunk  # what is not on the device any more is not held there either
            with self._changed:
                self._device_bytes -= nbytes
                self._changed.notify_all()

    def _write(self) -> None:
        """Write chunks and list them."""
        while (chunk := self._on_host.get()) is not None:
            key, nbytes, reason = chunk.key, chunk.kv.nbytes, None
            try:
                put_and_list(self._store, self._catalogue, [chunk], self._shard)
            except KVBlendError as error:
                reason = str(error)
            except Exception as error:  # whatever else goes wrong must not end the thread
                reason = f"The chunk could not be written: {error!r}."
            del chunk  # what is not in line any more is not held either
            self._leaves(key, nbytes, reason)

    def _leaves(self, key: str, nbytes: int, failure: str | None) -> None:
        """A chunk is not in line any more."""
        with self._changed:
            if failure is not None:
                self._failures[key] = failure
            self._line_bytes -= nbytes
            self._changed.notify_all()


def _threads(work: Callable[[], None], name: str, count: int) -> list[threading.Thread]:
    threads = [threading.Thread(target=work, name=f"{name}-{index}", daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    return threads


__all__ = ["Writer"]
