"""HotChunks: KV that traffic keeps asking for, held in the GPU's own memory.

A chunk enters when it is asked for a second time among the last few thousand (the idea of 2Q: Johnson and
Shasha, VLDB 1994), so that what is read once pushes nothing out; the least recently used leave first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from kvblend_rag.store.encoded import KV, buffer_of, in_buffer

_REMEMBERED = 4096
"""Chunks whose first use is remembered."""


@dataclass(frozen=True)
class _Held:
    kv: KV
    arrived: torch.cuda.Event | None
    """Behind the copy that brought it; None on a CPU, where copying is done when it returns."""

    @property
    def there(self) -> bool:
        return self.arrived is None or self.arrived.query()


class HotChunks:
    """A bounded cache of whole chunks on the model's device.

    Args:
        max_bytes: bound on the KV held; 0 holds none.
        device: the model's.
    """

    def __init__(self, max_bytes: int, device: torch.device) -> None:
        self._max_bytes, self._device = max_bytes, device
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._asked_once: OrderedDict[str, None] = OrderedDict()
        self._nbytes = 0
        self._stream = torch.cuda.Stream(device) if max_bytes and device.type == "cuda" else None

    @property
    def nbytes(self) -> int:
        """Bytes of KV held, encoded where it is."""
        return self._nbytes

    def take(self, keys: Iterable[str]) -> dict[str, KV]:
        """Those of the chunks that are here, by key: (layers, 2, tokens, kv_heads, head_dim) on the device.

        KV stays valid for whoever holds it, also when the chunk leaves.
        """
        found = {}
        for key in keys:
            held = self._held.get(key)
            if held is not None and held.there:
                self._held.move_to_end(key)
                found[key] = held.kv
        return found

    def offer(self, chunks: Mapping[str, KV]) -> None:
        """Chunks that were just used from slower tiers; those asked for before are brought here.

        The copies wait for the work that the current stream has before it, so that they slow no request
        that is under way.
        """
        for key, kv in chunks.items():
            if key in self._held or kv.nbytes > self._max_bytes:
                continue
            if key not in self._asked_once:
                self._asked_once[key] = None
                if len(self._asked_once) > _REMEMBERED:
                    self._asked_once.popitem(last=False)
                continue
            del self._asked_once[key]
            while self._nbytes + kv.nbytes > self._max_bytes:
                self._drop(next(iter(self._held)))
            self._held[key] = self._copied(kv)
            self._nbytes += kv.nbytes

    def forget(self, keys: Iterable[str]) -> None:
        """Let chunks go."""
        for key in keys:
            self._asked_once.pop(key, None)
            if key in self._held:
                self._drop(key)

    def _copied(self, kv: KV) -> _Held:
        source = buffer_of(kv)
        # Allocated on the current stream: what used this memory before is ahead of us there.
        copy = torch.empty_like(source, device=self._device)
        arrived = None
        if self._stream is None:
            copy.copy_(source)
        else:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                copy.copy_(source, non_blocking=True)
                arrived = torch.cuda.Event()
                arrived.record()
            # A chunk may leave again before its copy has run.
            copy.record_stream(self._stream)
        return _Held(in_buffer(kv, copy), arrived)

    def _drop(self, key: str) -> None:
        self._nbytes -= self._held.pop(key).kv.nbytes


__all__ = ["HotChunks"]
