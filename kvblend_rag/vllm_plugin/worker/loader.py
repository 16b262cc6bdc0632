"""Loaders: stored chunks into the paged cache, keys rotated to where they stand now.

``DirectLoader`` does it at once and on any device. ``StreamLoader`` overlaps: copies of a layer run while
the layers before it compute, and whoever needs a layer waits for that layer alone.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod

import numpy as np
import torch

from kvblend_rag.blend.plan import BlendPlan
from kvblend_rag.blend.rope import Rotary, rotate, shift
from kvblend_rag.store.encoded import KV, EncodedKV
from kvblend_rag.vllm_plugin.worker.paged_kv import AttentionLayer, PagedKV
from kvblend_rag.vllm_plugin.worker.upload import Upload

Chunks = dict[str, KV]
"""By key: a chunk's KV, (layers, 2, tokens, kv_heads, head_dim) on the host or the model's device."""

Turn = tuple[torch.Tensor, torch.Tensor]


def turning(rotary: Rotary | None) -> tuple[int, bool] | None:
    """The same for layers that rotate alike; None where nothing is rotated."""
    return None if rotary is None else (rotary.table.data_ptr(), rotary.interleaved)


class Turns:
    """Rotations of one request's reused tokens, by layer; layers that share a table share them.

    Args:
        plan: which chunk tokens stand where.
        context_tokens: length of the ingest context, behind which stored chunks were computed.
        upload: to the device of the results.

    Attributes:
        seconds: host time that ``rotated`` spent on rotations, so far.
    """

    def __init__(self, plan: BlendPlan, context_tokens: int, upload: Upload) -> None:
        positions, which = plan.reused_positions()
        behind = [context_tokens if run.behind is None else run.behind for run in plan.runs]
        back = np.array([run.chunk_start - run.start for run in plan.runs], dtype=np.int64) + behind
        self._new = upload(torch.from_numpy(positions))
        self._stored = upload(torch.from_numpy(positions + back[which]))
        self._known: dict[tuple[int, bool], Turn] = {}
        self.seconds = 0.0

    def of(self, rotary: Rotary | None) -> Turn | None:
        """Cosines and sines, each (tokens, rotary_dim / 2) float32; None where nothing is rotated."""
        which = turning(rotary)
        if rotary is None or which is None:
            return None
        if which not in self._known:
            self._known[which] = shift(rotary, self._stored, self._new)
        return self._known[which]


def rotated(
    plan: BlendPlan, chunks: Chunks, turns: Turns, index: int, layer: AttentionLayer, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the reused tokens at one layer, each (tokens, kv_heads, head_dim), keys rotated."""
    at_layer = [_layer(chunks[run.key], index, device) for run in plan.runs]
    parts = [kv[:, run.chunk_start : run.chunk_start + run.length] for kv, run in zip(at_layer, plan.runs, strict=True)]
    if len({part.device for part in parts}) > 1:
        parts = [part.to(device) for part in parts]
    keys, values = torch.cat(parts, dim=1).to(device)
    started = time.perf_counter()
    turn = turns.of(layer.rotary)
    if turn is not None and layer.rotary is not None:
        keys = rotate(keys, *turn, layer.rotary.interleaved)
    turns.seconds += time.perf_counter() - started
    return keys, values


def _layer(kv: KV, index: int, device: torch.device) -> torch.Tensor:
    """(2, tokens, kv_heads, head_dim), decoded where that is quicker."""
    return kv.decode_layer(index, device) if isinstance(kv, EncodedKV) else kv[index]


class Loader(ABC):
    """Brings the reused tokens' KV of one request at a time into the paged cache."""

    @abstractmethod
    def fetch(self, plan: BlendPlan, chunks: Chunks) -> None:
        """Begin to bring the chunks that a plan names nearer, before it is known which tokens are wanted."""

    @abstractmethod
    def place(self, slots: torch.Tensor, turns: Turns) -> None:
        """Begin to write what was fetched last.

        Args:
            slots: (reused tokens,) int64, on the host; a token at −1 is left out, since it will be recomputed.
            turns: the request's rotations.
        """

    @abstractmethod
    def wait(self, layer_name: str) -> None:
        """Make the current stream wait until a layer of the last request is loaded."""

    @abstractmethod
    def wait_for_all(self) -> None:
        """Make the current stream wait until the whole of the last request is loaded."""


class DirectLoader(Loader):
    """Loads everything before ``place`` returns, through the backend's own cache write."""

    def __init__(self, paged: PagedKV) -> None:
        self._paged = paged
        self._fetched: tuple[BlendPlan, Chunks]

    def fetch(self, plan: BlendPlan, chunks: Chunks) -> None:
        """See :meth:`Loader.fetch`."""
        self._fetched = plan, chunks

    def place(self, slots: torch.Tensor, turns: Turns) -> None:
        """See :meth:`Loader.place`."""
        plan, chunks = self._fetched
        device_slots = slots.to(self._paged.device)
        wanted = device_slots >= 0
        if not wanted.any():  # a kernel that has nothing to write can't be launched
            return
        for index, layer in enumerate(self._paged.layers):
            keys, values = rotated(plan, chunks, turns, index, layer, self._paged.device)
            self._paged.write(layer, keys[wanted], values[wanted], device_slots[wanted])

    def wait(self, layer_name: str) -> None:
        """Nothing is under way."""

    def wait_for_all(self) -> None:
        """Nothing is under way."""


__all__ = ["Chunks", "DirectLoader", "Loader", "Turns", "rotated", "turning"]
