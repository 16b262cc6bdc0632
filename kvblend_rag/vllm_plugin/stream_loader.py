"""StreamLoader: page-locked host memory → staging ring → paged cache, on streams of its own.

Copies go through the DMA engines in one driver call a batch (``ops.swap_blocks_batch``, cuMemcpyBatchAsync);
a fused kernel rotates and scatters. The compute stream waits layer by layer, so that the copy of layer
l + 1 hides behind the computation of layer l.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from vllm import _custom_ops as ops

from kvblend_rag.blend.plan import BlendPlan
from kvblend_rag.kernels.rotate_scatter import rotate_scatter
from kvblend_rag.vllm_plugin.loader import Chunks, Loader, Turns
from kvblend_rag.vllm_plugin.paged_kv import PagedKV

_SLOT_BYTES = 32 << 20
"""Staged at a time: long enough a copy to run at full bandwidth."""

_SLOTS = 4


@dataclass(frozen=True)
class _Batch:
    """Runs whose chunks are staged together, the same for every layer."""

    keys: tuple[str, ...]
    first: int
    """Index of the first of its reused tokens."""
    stop: int


class StreamLoader(Loader):
    """See the module; works where a block's keys and values lie side by side for each token."""

    def __init__(self, paged: PagedKV) -> None:
        self._paged = paged
        self._copies, self._scatters = torch.cuda.Stream(), torch.cuda.Stream()
        elements = _SLOT_BYTES // paged.dtype.itemsize
        self._ring = [torch.empty(elements, dtype=paged.dtype, device=paged.device) for _ in range(_SLOTS)]
        self._free = [torch.cuda.Event() for _ in range(_SLOTS)]
        self._ready: dict[str, torch.cuda.Event] = {}
        self._in_flight: deque[tuple[torch.cuda.Event, list[torch.Tensor]]] = deque()

    def start(self, plan: BlendPlan, chunks: Chunks, slots: torch.Tensor, turns: Turns) -> None:
        """See :meth:`Loader.start`."""
        self._let_go()
        # Chunks that didn't come from the memory tier are pageable: no asynchronous copy reads them.
        pinned = {key: kv if kv.is_pinned() else kv.pin_memory() for key, kv in chunks.items()}
        batches, keys_at, values_at = self._layout(plan, pinned)
        keys_at, values_at = keys_at.to(self._paged.device), values_at.to(self._paged.device)
        by_layer = [turns.of(layer.rotary) for layer in self._paged.layers]
        # What the tables are made of, and whoever used the blocks before, is ahead of us on this stream.
        self._scatters.wait_stream(torch.cuda.current_stream())
        turn_of_ring = 0
        for index, layer in enumerate(self._paged.layers):
            turn = by_layer[index]
            for batch in batches:
                ring, free = self._ring[turn_of_ring], self._free[turn_of_ring]
                turn_of_ring = (turn_of_ring + 1) % _SLOTS
                copied = torch.cuda.Event()
                with torch.cuda.stream(self._copies):
                    self._copies.wait_event(free)
                    _copy([pinned[key][index] for key in batch.keys], ring)
                    copied.record()
                part = slice(batch.first, batch.stop)
                with torch.cuda.stream(self._scatters):
                    self._scatters.wait_event(copied)
                    rotate_scatter(
                        ring,
                        keys_at[part],
                        values_at[part],
                        slots[part],
                        None if turn is None else (turn[0][part], turn[1][part]),
                        layer.rotary is not None and layer.rotary.interleaved,
                        layer.cache,
                    )
                    free.record()
            with torch.cuda.stream(self._scatters):
                ready = torch.cuda.Event()
                ready.record()
            self._ready[layer.name] = ready
        tables = [keys_at, values_at, slots, *(each for turn in by_layer if turn is not None for each in turn)]
        for table in tables:
            table.record_stream(self._scatters)
        self._in_flight.append((self._ready[self._paged.layers[-1].name], list(pinned.values())))

    def wait(self, layer_name: str) -> None:
        """See :meth:`Loader.wait`."""
        ready = self._ready.get(layer_name)
        if ready is not None:
            torch.cuda.current_stream().wait_event(ready)

    def wait_for_all(self) -> None:
        """See :meth:`Loader.wait_for_all`."""
        self.wait(self._paged.layers[-1].name)

    def _layout(self, plan: BlendPlan, chunks: Chunks) -> tuple[list[_Batch], torch.Tensor, torch.Tensor]:
        """Batches, and the element offsets of each reused token's keys and values in a staging slot."""
        room, row = self._ring[0].numel(), self._paged.heads * self._paged.head_dim
        batches: list[_Batch] = []
        keys_at, values_at = [], []
        staged: dict[str, int] = {}
        used = first = token = 0
        for run in plan.runs:
            tokens = chunks[run.key].shape[2]
            size = 2 * tokens * row
            if run.key not in staged and used + size > room and staged:
                batches.append(_Batch(tuple(staged), first, token))
                staged, used, first = {}, 0, token
            if run.key not in staged:
                staged[run.key] = used
                used += size
            start = staged[run.key] + row * torch.arange(run.chunk_start, run.chunk_start + run.length)
            keys_at.append(start)
            values_at.append(start + row * tokens)
            token += run.length
        batches.append(_Batch(tuple(staged), first, token))
        if used > room:
            self._grow(used)
        return batches, torch.cat(keys_at), torch.cat(values_at)

    def _grow(self, elements: int) -> None:
        """A single chunk's layer is larger than a staging slot: make all slots as large."""
        torch.cuda.synchronize()
        self._ring = [torch.empty(elements, dtype=ring.dtype, device=ring.device) for ring in self._ring]

    def _let_go(self) -> None:
        """Chunks whose copies are done need not be held any longer."""
        while self._in_flight and self._in_flight[0][0].query():
            self._in_flight.popleft()


def _copy(sources: list[torch.Tensor], target: torch.Tensor) -> None:
    """Copy contiguous host tensors one behind another into a device buffer, in one driver call."""
    sizes = torch.tensor([source.nbytes for source in sources], dtype=torch.int64)
    starts = sizes.cumsum(0) - sizes + target.data_ptr()
    ops.swap_blocks_batch(
        torch.tensor([source.data_ptr() for source in sources], dtype=torch.int64),
        starts,
        sizes,
        is_src_access_order_any=True,
    )


__all__ = ["StreamLoader"]
