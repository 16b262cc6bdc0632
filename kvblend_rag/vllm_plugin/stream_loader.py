"""StreamLoader: page-locked host memory → staging ring → paged cache, on streams of its own.

Chunks that lie on the device already are scattered from where they are.

Copies go through the DMA engines in one driver call a batch (``ops.swap_blocks_batch``, cuMemcpyBatchAsync);
a fused kernel rotates and scatters. Layers are sent off a few ahead of the one that is waited for, so that
neither the copies nor the host time to launch them stand in front of the computation.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch
from vllm import _custom_ops as ops

from kvblend_rag.blend.plan import BlendPlan
from kvblend_rag.kernels.rotate_scatter import rotate_scatter
from kvblend_rag.vllm_plugin.loader import Chunks, Loader, Turn, Turns
from kvblend_rag.vllm_plugin.paged_kv import PagedKV

_SLOT_BYTES = 128 << 20
"""Staged at a time: a layer of 32,000 tokens of an 8B model."""

_SLOTS = 3

_AHEAD = 4
"""Layers that are sent off beyond the one waited for; the ring holds back those it has no room for."""


@dataclass(frozen=True)
class _Batch:
    """Runs whose chunks are staged together, the same for every layer."""

    sources: torch.Tensor
    """(chunks,) int64: host address of each chunk's first layer."""
    steps: torch.Tensor
    """(chunks,) int64: bytes from one layer to the next, which is also what is copied."""
    offsets: torch.Tensor
    """(chunks,) int64: where in a staging slot each goes, in bytes."""
    tokens: slice
    """Its part of the reused tokens."""


@dataclass(frozen=True)
class _Resident:
    """Reused tokens whose chunks lie on the device already; these need no staging."""

    base: torch.Tensor
    """One of the chunks: the offsets of all are counted from its first element."""
    steps: torch.Tensor
    """(reused tokens,) int64: elements from one layer of the token's chunk to the next."""
    tokens: torch.Tensor
    """(reused tokens,) bool, on the host."""


@dataclass
class _Load:
    """A request on its way: a layer after the other, and in each a batch after the other."""

    batches: list[_Batch]
    held: list[torch.Tensor]
    """Chunks that must not go before they are copied or scattered."""
    resident: _Resident | None
    first_slot: int
    """Staging slot of the first batch of the first layer; the others follow in turn."""
    keys_at: torch.Tensor = field(init=False)
    values_at: torch.Tensor = field(init=False)
    copied: list[torch.cuda.Event] = field(default_factory=list)
    """Recorded behind each copy that was sent off."""
    slots: torch.Tensor | None = None
    resident_slots: torch.Tensor | None = None
    turns: list[Turn | None] = field(default_factory=list)
    scattered: int = 0
    ready: list[torch.cuda.Event] = field(default_factory=list)
    """By layer that was sent off: recorded behind its scatter."""


class StreamLoader(Loader):
    """See the module; works where a block's keys and values lie side by side for each token."""

    def __init__(self, paged: PagedKV) -> None:
        self._paged = paged
        self._index = {layer.name: index for index, layer in enumerate(paged.layers)}
        self._copies = torch.cuda.Stream()
        # A scatter is short, and what waits for it is long.
        self._scatters = torch.cuda.Stream(priority=-1)
        elements = _SLOT_BYTES // paged.dtype.itemsize
        self._ring = [torch.empty(elements, dtype=paged.dtype, device=paged.device) for _ in range(_SLOTS)]
        self._free = [torch.cuda.Event() for _ in range(_SLOTS)]
        self._next_slot = 0
        self._load: _Load | None = None
        self._in_flight: deque[_Load] = deque()

    def fetch(self, plan: BlendPlan, chunks: Chunks) -> None:
        """See :meth:`Loader.fetch`: as much as the staging ring holds."""
        self._let_go()
        # Chunks that didn't come from the memory tier are pageable: no asynchronous copy reads them.
        ready = {key: kv if kv.is_cuda or kv.is_pinned() else kv.pin_memory() for key, kv in chunks.items()}
        batches, resident, keys_at, values_at = self._layout(plan, ready)
        load = _Load(batches, list(ready.values()), resident, self._next_slot)
        self._next_slot = (self._next_slot + len(batches) * len(self._paged.layers)) % _SLOTS
        self._copy_ahead(load)
        load.keys_at, load.values_at = self._paged.upload(keys_at), self._paged.upload(values_at)
        self._load = load
        self._in_flight.append(load)

    def place(self, slots: torch.Tensor, turns: Turns) -> None:
        """See :meth:`Loader.place`."""
        load = self._load
        assert load is not None
        if load.resident is not None:
            load.resident_slots = self._paged.upload(slots.masked_fill(~load.resident.tokens, -1))
            slots = slots.masked_fill(load.resident.tokens, -1)
        load.slots = self._paged.upload(slots)
        load.turns = [turns.of(layer.rotary) for layer in self._paged.layers]
        # What the tables are made of, and whoever used the blocks before, is ahead of us on this stream.
        self._scatters.wait_stream(torch.cuda.current_stream())
        self._send(load, _AHEAD)

    def wait(self, layer_name: str) -> None:
        """See :meth:`Loader.wait`."""
        if self._load is not None:
            index = self._index[layer_name]
            self._send(self._load, index + 1 + _AHEAD)
            torch.cuda.current_stream().wait_event(self._load.ready[index])

    def wait_for_all(self) -> None:
        """See :meth:`Loader.wait_for_all`."""
        self.wait(self._paged.layers[-1].name)
        self._load = None

    def _copy_ahead(self, load: _Load) -> None:
        """Send off the copies that the staging ring has room for."""
        total = len(load.batches) * len(self._paged.layers)
        while len(load.copied) < min(load.scattered + _SLOTS, total):
            index, which = divmod(len(load.copied), len(load.batches))
            batch, slot = load.batches[which], (load.first_slot + len(load.copied)) % _SLOTS
            copied = torch.cuda.Event()
            with torch.cuda.stream(self._copies):
                self._copies.wait_event(self._free[slot])
                ops.swap_blocks_batch(
                    batch.sources + index * batch.steps,
                    batch.offsets + self._ring[slot].data_ptr(),
                    batch.steps,
                    is_src_access_order_any=True,
                )
                copied.record()
            load.copied.append(copied)

    def _send(self, load: _Load, layers: int) -> None:
        """Have the first so many layers of the request on their way."""
        for index in range(len(load.ready), min(layers, len(self._paged.layers))):
            if load.resident is not None:
                self._scatter_resident(load, index, load.resident)
            for batch in load.batches:
                self._copy_ahead(load)
                self._scatter(load, index, batch)
            ready = torch.cuda.Event()
            ready.record(self._scatters)
            load.ready.append(ready)
        self._copy_ahead(load)

    def _scatter(self, load: _Load, index: int, batch: _Batch) -> None:
        assert load.slots is not None
        layer, turn, part = self._paged.layers[index], load.turns[index], batch.tokens
        slot = (load.first_slot + load.scattered) % _SLOTS
        with torch.cuda.stream(self._scatters):
            self._scatters.wait_event(load.copied[load.scattered])
            rotate_scatter(
                self._ring[slot],
                load.keys_at[part],
                load.values_at[part],
                load.slots[part],
                None if turn is None else (turn[0][part], turn[1][part]),
                layer.rotary is not None and layer.rotary.interleaved,
                layer.cache,
            )
            self._free[slot].record()
        load.scattered += 1

    def _scatter_resident(self, load: _Load, index: int, resident: _Resident) -> None:
        assert load.resident_slots is not None
        layer = self._paged.layers[index]
        with torch.cuda.stream(self._scatters):
            rotate_scatter(
                resident.base,
                load.keys_at + index * resident.steps,
                load.values_at + index * resident.steps,
                load.resident_slots,
                load.turns[index],
                layer.rotary is not None and layer.rotary.interleaved,
                layer.cache,
            )

    def _layout(
        self, plan: BlendPlan, chunks: Chunks
    ) -> tuple[list[_Batch], _Resident | None, torch.Tensor, torch.Tensor]:
        """Batches, what needs none, and where each reused token's keys and values are.

        Places are element offsets: in a staging slot, or of the first layer from ``_Resident.base``.
        """
        itemsize, row = self._paged.dtype.itemsize, self._paged.heads * self._paged.head_dim
        room = self._ring[0].numel()
        batches: list[_Batch] = []
        keys_at, values_at, steps = [], [], []
        base = next((kv for kv in chunks.values() if kv.is_cuda), None)
        staged: dict[str, int] = {}
        used = first = token = largest = 0

        def close() -> None:
            if not staged:
                return
            kvs = [chunks[key] for key in staged]
            batches.append(
                _Batch(
                    torch.tensor([kv.data_ptr() for kv in kvs]),
                    torch.tensor([kv[0].nbytes for kv in kvs]),
                    torch.tensor([start * itemsize for start in staged.values()]),
                    slice(first, token),
                )
            )

        for run in plan.runs:
            chunk = chunks[run.key]
            tokens = chunk.shape[2]
            size = 2 * tokens * row
            if chunk.is_cuda:
                assert base is not None
                origin, step = (chunk.data_ptr() - base.data_ptr()) // itemsize, size
            else:
                if run.key not in staged and staged and used + size > room:
                    close()
                    staged, used, first = {}, 0, token
                if run.key not in staged:
                    staged[run.key] = used
                    used += size
                    largest = max(largest, used)
                origin, step = staged[run.key], 0
            start = origin + row * torch.arange(run.chunk_start, run.chunk_start + run.length)
            steps.append(torch.full((run.length,), step))
            keys_at.append(start)
            values_at.append(start + row * tokens)
            token += run.length
        close()
        if largest > room:
            self._grow(largest)
        step_of = torch.cat(steps)
        resident = None if base is None else _Resident(base, self._paged.upload(step_of), step_of > 0)
        return batches, resident, torch.cat(keys_at), torch.cat(values_at)

    def _grow(self, elements: int) -> None:
        """A single chunk's layer is larger than a staging slot: make all slots as large."""
        torch.cuda.synchronize()
        self._ring = [torch.empty(elements, dtype=ring.dtype, device=ring.device) for ring in self._ring]

    def _let_go(self) -> None:
        """What loads that are done have held need not be held any longer."""
        while self._in_flight:
            done = self._in_flight[0]
            if len(done.ready) < len(self._paged.layers) or not done.ready[-1].query():
                return
            self._in_flight.popleft()


__all__ = ["StreamLoader"]
