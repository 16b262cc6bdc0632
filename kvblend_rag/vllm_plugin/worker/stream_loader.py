"""StreamLoader: page-locked host memory → staging ring → paged cache, on streams of its own.

Chunks that lie on the device already are scattered from where they are.

Copies go through the DMA engines in one driver call a batch (``ops.swap_blocks_batch``, cuMemcpyBatchAsync);
a fused kernel rotates and scatters. Layers are sent off a few ahead of the one that is waited for, so that
neither the copies nor the host time to launch them stand in front of the computation.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from vllm import _custom_ops as ops

from kvblend_rag.blend.plan import BlendPlan
from kvblend_rag.kernels.paged_caches import launches
from kvblend_rag.kernels.rotate_scatter import rotate_scatter
from kvblend_rag.vllm_plugin.worker.loader import Chunks, Loader, Turn, Turns, turning
from kvblend_rag.vllm_plugin.worker.paged_kv import PagedKV

_SLOT_BYTES = 128 << 20
"""Staged at a time: a layer of 32,000 tokens of an 8B model."""

_SLOTS = 3

_TOGETHER = 8
"""Layers that are scattered at once, at most: of a short prompt a launch a layer would take longer than the copies."""

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
    """(chunks,) int64: where each goes, in bytes from where its layer begins in a staging slot."""
    nbytes: int
    """Of one layer of all of them."""
    tokens: slice
    """Its part of the reused tokens."""


@dataclass(frozen=True)
class _Shipment:
    """What one scatter brings: some layers of a batch's chunks, which fill a staging slot."""

    layers: range
    batch: _Batch | None
    """None where all chunks lie on the device."""
    opens: bool
    """It is the first that brings anything of these layers; what lies on the device goes with it."""
    closes: bool
    """It is the last."""


@dataclass(frozen=True)
class _Resident:
    """Reused tokens whose chunks lie on the device already; these need no staging."""

    base: torch.Tensor
    """One of the chunks: the offsets of all are counted from its first element."""
    tokens: torch.Tensor
    """(reused tokens,) bool, on the host."""


@dataclass
class _Load:
    """A request on its way, a shipment after the other."""

    shipments: list[_Shipment]
    held: list[torch.Tensor]
    """Chunks that must not go before they are copied or scattered."""
    resident: _Resident | None
    first_slot: int
    """Staging slot of the first shipment; the others follow in turn."""
    keys_at: torch.Tensor = field(init=False)
    values_at: torch.Tensor = field(init=False)
    steps: torch.Tensor = field(init=False)
    """(reused tokens,) int64: elements from one layer of a token to the next."""
    copied: list[torch.cuda.Event] = field(default_factory=list)
    """Recorded behind each copy that was sent off."""
    slots: torch.Tensor | None = None
    resident_slots: torch.Tensor | None = None
    turns: list[Turn | None] = field(default_factory=list)
    scattered: int = 0
    ready: list[torch.cuda.Event] = field(default_factory=list)
    """By layer that was sent off: recorded behind its scatter."""


class StreamLoader(Loader):
    """See the module; works where kernels can read the paged cache (``PagedKV.caches``)."""

    def __init__(self, paged: PagedKV) -> None:
        assert paged.caches is not None
        self._paged, self._caches = paged, paged.caches
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
        batches, resident, tables = self._layout(plan, ready)
        load = _Load(self._shipments(batches), list(ready.values()), resident, self._next_slot)
        if batches:
            self._next_slot = (self._next_slot + len(load.shipments)) % _SLOTS
        self._copy_ahead(load)
        load.keys_at, load.values_at, load.steps = self._paged.upload(tables)
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

    def _shipments(self, batches: list[_Batch]) -> list[_Shipment]:
        """What is sent off, in this order.

        The first layer goes alone, since the computation waits for it; then as many at once as a staging slot holds.
        """
        parts: list[_Batch | None] = [*batches] or [None]
        room = _TOGETHER if len(parts) == 1 else 1
        if batches:
            room = max(1, min(room, self._ring[0].nbytes // batches[0].nbytes))
        turns = [turning(layer.rotary) for layer in self._paged.layers]
        return [
            _Shipment(layers, part, opens=part is parts[0], closes=part is parts[-1])
            for layers in launches(turns, room, first=1)
            for part in parts
        ]

    def _copy_ahead(self, load: _Load) -> None:
        """Send off the copies that the staging ring has room for."""
        while len(load.copied) < min(load.scattered + _SLOTS, len(load.shipments)):
            shipment = load.shipments[len(load.copied)]
            batch, slot = shipment.batch, (load.first_slot + len(load.copied)) % _SLOTS
            if batch is None:
                return
            layers = torch.arange(len(shipment.layers))[:, None]
            copied = torch.cuda.Event()
            with torch.cuda.stream(self._copies):
                self._copies.wait_event(self._free[slot])
                ops.swap_blocks_batch(
                    (batch.sources + (shipment.layers.start + layers) * batch.steps).flatten(),
                    (batch.offsets + layers * batch.nbytes + self._ring[slot].data_ptr()).flatten(),
                    batch.steps.repeat(len(layers)),
                    is_src_access_order_any=True,
                )
                copied.record()
            load.copied.append(copied)

    def _send(self, load: _Load, layers: int) -> None:
        """Have at least the first so many layers of the request on their way."""
        while len(load.ready) < min(layers, len(self._paged.layers)):
            shipment = load.shipments[load.scattered]
            if load.resident is not None and shipment.opens:
                self._scatter(load, shipment.layers, 0, load.resident.base, load.resident_slots, slice(None))
            if shipment.batch is not None:
                self._copy_ahead(load)
                slot = (load.first_slot + load.scattered) % _SLOTS
                self._scatters.wait_event(load.copied[load.scattered])
                first = shipment.layers.start
                self._scatter(load, shipment.layers, first, self._ring[slot], load.slots, shipment.batch.tokens)
                self._free[slot].record(self._scatters)
            load.scattered += 1
            if shipment.closes:
                ready = torch.cuda.Event()
                ready.record(self._scatters)
                load.ready += [ready] * len(shipment.layers)
        self._copy_ahead(load)

    def _scatter(
        self,
        load: _Load,
        layers: range,
        placed_at: int,
        source: torch.Tensor,
        slots: torch.Tensor | None,
        part: slice,
    ) -> None:
        assert slots is not None
        turn, rotary = load.turns[layers.start], self._paged.layers[layers.start].rotary
        with torch.cuda.stream(self._scatters):
            rotate_scatter(
                source,
                load.keys_at[part],
                load.values_at[part],
                load.steps[part],
                slots[part],
                None if turn is None else (turn[0][part], turn[1][part]),
                rotary is not None and rotary.interleaved,
                self._caches,
                layers,
                placed_at,
            )

    def _layout(self, plan: BlendPlan, chunks: Chunks) -> tuple[list[_Batch], _Resident | None, torch.Tensor]:
        """Batches, what needs none, and (3, reused tokens) int64: where each token's keys and values are, and how far
        it is to those of the next layer.

        All in elements: from where a layer begins in a staging slot, or from ``_Resident.base``.
        """
        itemsize, row = self._paged.dtype.itemsize, self._paged.heads * self._paged.head_dim
        room, runs = self._ring[0].numel(), plan.runs
        lengths = np.array([run.length for run in runs], dtype=np.int64)
        begins = lengths.cumsum() - lengths
        origins, steps = np.zeros((2, len(runs)), dtype=np.int64)
        near = np.array([chunks[run.key].is_cuda for run in runs])
        base = next((kv for kv in chunks.values() if kv.is_cuda), None)
        batches: list[_Batch] = []
        staged: dict[str, int] = {}
        used = first = largest = 0

        def close(stop: int) -> None:
            kvs = [chunks[key] for key in staged]
            batches.append(
                _Batch(
                    torch.tensor([kv.data_ptr() for kv in kvs]),
                    torch.tensor([kv[0].nbytes for kv in kvs]),
                    torch.tensor([start * itemsize for start in staged.values()]),
                    used * itemsize,
                    slice(int(begins[first]), int(begins[stop - 1] + lengths[stop - 1])),
                )
            )
            steps[first:stop][~near[first:stop]] = used

        for index, run in enumerate(runs):
            chunk = chunks[run.key]
            size = chunk[0].numel()
            if chunk.is_cuda:
                assert base is not None
                origins[index], steps[index] = (chunk.data_ptr() - base.data_ptr()) // itemsize, size
                continue
            if run.key not in staged:
                if staged and used + size > room:
                    close(index)
                    staged, used, first = {}, 0, index
                staged[run.key] = used
                used += size
                largest = max(largest, used)
            origins[index] = staged[run.key]
        if staged:
            close(len(runs))
        if largest > room:
            self._grow(largest)
        starts = np.array([run.chunk_start for run in runs], dtype=np.int64)
        keys_at = np.repeat(origins + row * (starts - begins), lengths) + row * np.arange(plan.reused_tokens)
        to_values = np.array([row * chunks[run.key].shape[2] for run in runs], dtype=np.int64)
        tables = np.stack([keys_at, keys_at + np.repeat(to_values, lengths), np.repeat(steps, lengths)])
        resident = None if base is None else _Resident(base, torch.from_numpy(np.repeat(near, lengths)))
        return batches, resident, torch.from_numpy(tables)

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
