"""StreamLoader: page-locked host memory → staging ring → paged cache, on streams of its own.

Chunks that lie on the device already are scattered from where they are.

Copies go through the DMA engines; a fused kernel rotates and scatters, and decodes what is encoded. Layers are sent
off a few ahead of the one that is waited for, so that neither the copies nor the host time to launch them stand in
front of the computation.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch

from kvblend_rag.blend.plan import BlendPlan
from kvblend_rag.kernels.decode_scatter import decode_scatter
from kvblend_rag.kernels.paged_caches import launches
from kvblend_rag.kernels.rotate_scatter import rotate_scatter
from kvblend_rag.store.encoded import KV
from kvblend_rag.vllm_plugin.worker.host_copies import Batch, cuda_runtime
from kvblend_rag.vllm_plugin.worker.loader import Chunks, Loader, Turn, Turns, turning
from kvblend_rag.vllm_plugin.worker.paged_kv import PagedKV
from kvblend_rag.vllm_plugin.worker.staging import Group, lay_out

_SLOT_BYTES = 128 << 20
"""Staged at a time: a layer of 32,000 tokens of an 8B model."""

_SLOTS = 3

_TOGETHER = 8
"""Layers that are scattered at once, at most: of a short prompt a launch a layer would take longer than the copies."""

_AHEAD = 4
"""Layers that are sent off beyond the one waited for; the ring holds back those it has no room for."""


@dataclass(frozen=True)
class _Shipment:
    """What one scatter brings: some layers of a batch's chunks, which fill a staging slot."""

    layers: range
    part: int
    """Which batch; the first that brings anything of these layers is 0, and what lies on the device goes with it."""
    batch: Batch | None
    """None where all chunks lie on the device."""
    closes: bool
    """It is the last of these layers."""


@dataclass
class _Load:
    """A request on its way, a shipment after the other."""

    shipments: list[_Shipment]
    held: list[KV]
    """Chunks that must not go before they are copied or scattered."""
    groups: list[Group]
    first_slot: int
    """Staging slot of the first shipment; the others follow in turn."""
    tables: list[torch.Tensor] = field(default_factory=list)
    """By group: its table, on the device."""
    copied: list[torch.cuda.Event] = field(default_factory=list)
    """Recorded behind each copy that was sent off."""
    slots: list[torch.Tensor] = field(default_factory=list)
    """By group: (reused tokens,) int64, −1 also where the group's table tells of another's tokens."""
    turns: list[Turn | None] = field(default_factory=list)
    scattered: int = 0
    ready: list[torch.cuda.Event] = field(default_factory=list)
    """By layer that was sent off: recorded behind its scatter."""


class StreamLoader(Loader):
    """See the module; works where kernels can read the paged cache (``PagedKV.caches``)."""

    def __init__(self, paged: PagedKV) -> None:
        assert paged.caches is not None
        cuda_runtime()  # what it lacks is to be told before the first request
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
        itemsize = self._paged.dtype.itemsize
        row_bytes = self._paged.heads * self._paged.head_dim * itemsize
        layout = lay_out(plan, ready, self._ring[0].nbytes, row_bytes, itemsize)
        if layout.largest > self._ring[0].nbytes:
            self._grow(layout.largest)
        load = _Load(self._shipments(layout.batches), list(ready.values()), layout.groups, self._next_slot)
        if layout.batches:
            self._next_slot = (self._next_slot + len(load.shipments)) % _SLOTS
        self._copy_ahead(load)
        tables = {id(group.table): group.table for group in layout.groups}  # what is as computed may share one
        uploaded = {name: self._paged.upload(table) for name, table in tables.items()}
        load.tables = [uploaded[id(group.table)] for group in layout.groups]
        self._load = load
        self._in_flight.append(load)

    def place(self, slots: torch.Tensor, turns: Turns) -> None:
        """See :meth:`Loader.place`."""
        load = self._load
        assert load is not None
        whole = None
        for group in load.groups:
            if group.tokens is not None:
                load.slots.append(self._paged.upload(slots.masked_fill(~group.tokens, -1)))
            else:
                whole = self._paged.upload(slots) if whole is None else whole
                load.slots.append(whole)
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

    def _shipments(self, batches: list[Batch]) -> list[_Shipment]:
        """What is sent off, in this order.

        The first layer goes alone, since the computation waits for it; then as many at once as a staging slot holds.
        """
        parts: list[Batch | None] = [*batches] or [None]
        room = _TOGETHER if len(parts) == 1 else 1
        if batches:
            room = max(1, min(room, self._ring[0].nbytes // batches[0].nbytes))
        turns = [turning(layer.rotary) for layer in self._paged.layers]
        return [
            _Shipment(layers, index, batch, closes=index == len(parts) - 1)
            for layers in launches(turns, room, first=1)
            for index, batch in enumerate(parts)
        ]

    def _copy_ahead(self, load: _Load) -> None:
        """Send off the copies that the staging ring has room for."""
        while len(load.copied) < min(load.scattered + _SLOTS, len(load.shipments)):
            shipment = load.shipments[len(load.copied)]
            batch, slot = shipment.batch, (load.first_slot + len(load.copied)) % _SLOTS
            if batch is None:
                return
            copied = torch.cuda.Event()
            with torch.cuda.stream(self._copies):
                self._copies.wait_event(self._free[slot])
                batch.copy(shipment.layers, self._ring[slot].data_ptr())
                copied.record()
            load.copied.append(copied)

    def _send(self, load: _Load, layers: int) -> None:
        """Have at least the first so many layers of the request on their way."""
        while len(load.ready) < min(layers, len(self._paged.layers)):
            shipment = load.shipments[load.scattered]
            if shipment.part == 0:
                self._scatter(load, shipment.layers, None, 0)
            if shipment.batch is not None:
                self._copy_ahead(load)
                slot = (load.first_slot + load.scattered) % _SLOTS
                self._scatters.wait_event(load.copied[load.scattered])
                self._scatter(load, shipment.layers, self._ring[slot], shipment.part)
                self._free[slot].record(self._scatters)
            load.scattered += 1
            if shipment.closes:
                ready = torch.cuda.Event()
                ready.record(self._scatters)
                load.ready += [ready] * len(shipment.layers)
        self._copy_ahead(load)

    def _scatter(self, load: _Load, layers: range, staged: torch.Tensor | None, part: int) -> None:
        """One part of all groups: of those that are staged, or, without, of those that lie on the device."""
        rotary = self._paged.layers[layers.start].rotary
        for group, table, slots in zip(load.groups, load.tables, load.slots, strict=True):
            source = group.base if staged is None else staged if group.base is None else None
            if source is None:
                continue
            within, turn = group.parts[part], load.turns[layers.start]
            placed_at = 0 if staged is None else layers.start
            to = (rotary is not None and rotary.interleaved, self._caches, layers, placed_at)
            with torch.cuda.stream(self._scatters):
                if group.encoding == "none":
                    turn = None if turn is None else (turn[0][within], turn[1][within])
                    keys_at, values_at, steps = table[:, within]
                    rotate_scatter(source, keys_at, values_at, steps, slots[within], turn, *to)
                else:
                    decode_scatter(source.view(torch.uint8), table[within], slots, turn, *to, group.encoding)

    def _grow(self, nbytes: int) -> None:
        """A single chunk's layer is larger than a staging slot: make all slots as large."""
        torch.cuda.synchronize()
        elements = nbytes // self._paged.dtype.itemsize
        self._ring = [torch.empty(elements, dtype=ring.dtype, device=ring.device) for ring in self._ring]

    def _let_go(self) -> None:
        """What loads that are done have held need not be held any longer."""
        while self._in_flight:
            done = self._in_flight[0]
            if len(done.ready) < len(self._paged.layers) or not done.ready[-1].query():
                return
            self._in_flight.popleft()


__all__ = ["StreamLoader"]
