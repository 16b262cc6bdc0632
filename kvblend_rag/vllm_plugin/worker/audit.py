"""Audit: is a stored chunk, loaded as for a prompt, what the model computes for the same tokens there?

The chunk is computed behind its ingest context with all positions moved on, which a rotary embedding makes
the same computation, and compared with the stored chunk after the loader has turned and placed it. Wrong
rotations, shifted or swapped chunks, foreign KV, missing layers and coarse quantisation all show as a deviation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kvblend_rag.blend.chunk import as_token_ids
from kvblend_rag.blend.match import Match
from kvblend_rag.blend.plan import BlendPlan
from kvblend_rag.errors import ChunkDamaged
from kvblend_rag.store import TieredStore
from kvblend_rag.vllm_plugin.worker.forward import Row, ScatteredForward
from kvblend_rag.vllm_plugin.worker.loader import Loader, Turns
from kvblend_rag.vllm_plugin.worker.paged_kv import BlockIds, PagedKV

_MOVED_BY = 1000
"""Positions: far enough for every rotary frequency but the slowest to matter."""


class Audit:
    """Compares stored with computed KV on one rank's heads.

    It writes into the paged cache's first blocks: only for an engine without requests, whose prefix cache is
    emptied before and after.

    Args:
        paged: the paged cache.
        forward: computes.
        loader: loads.
        store: this rank's chunks.
        context: token ids of the ingest context.
        max_model_len: positions the model knows.
    """

    def __init__(
        self,
        paged: PagedKV,
        forward: ScatteredForward,
        loader: Loader,
        store: TieredStore,
        context: Sequence[int],
        max_model_len: int,
    ) -> None:
        self._paged, self._forward, self._loader, self._store = paged, forward, loader, store
        self._context, self._max_model_len = as_token_ids(context), max_model_len

    @torch.inference_mode()
    def chunk(self, key: str, token_ids: Sequence[int]) -> dict[str, Any]:
        """One chunk's deviations, relative errors by layer: ``[keys, values]`` each.

        Args:
            key: the chunk's.
            token_ids: the whole chunk's.

        Returns:
            ``stored``: loaded against computed; ``noise``: computed once in one piece and once in two; ``moved``:
            values alone, ``[values]`` a layer, computed where the chunk was stored and where it is loaded. These
            know nothing of positions, so they differ by rounding: in experts at a near tie, or eight bits.

        Raises:
            ChunkDamaged: the chunk has another shape than this model's.
            ChunkMissing: it is not in the store.
        """
        tokens = as_token_ids(token_ids)
        kv, _ = self._store.get_with_tier(key)
        shape = self._paged.chunk_shape(len(tokens))
        if tuple(kv.shape) != shape:
            raise ChunkDamaged(f"The chunk {key} has the shape {tuple(kv.shape)}, and this model needs {shape}.")
        ahead, count = len(self._context), len(tokens)
        place = min(ahead + _MOVED_BY, self._max_model_len - count - 1)
        whole = np.concatenate([self._context, tokens])
        here, there = self._blocks(1, len(whole)), self._blocks(1 + self._blocks_of(len(whole)), len(whole))
        moved = place - ahead
        self._forward.run([Row(whole, here, 0, len(whole))])
        unmoved = self._paged.read_chunk(here, ahead, len(whole))[:, 1:]
        self._forward.run([Row(whole, here, 0, len(whole))], position_offset=moved)
        computed = self._paged.read_chunk(here, ahead, len(whole))
        half = ahead + count // 2
        for start, stop in ((0, half), (half, len(whole))):
            self._forward.run([Row(whole, there, start, stop)], position_offset=moved)
        again = self._paged.read_chunk(there, ahead, len(whole))
        plan = BlendPlan(place + count + 1, (Match(key, place, 0, count),))
        self._loader.fetch(plan, {key: kv})
        self._loader.place(self._paged.host_slots(there, torch.arange(count)), Turns(plan, ahead, self._paged.upload))
        self._loader.wait_for_all()
        loaded = self._paged.read_chunk(there, 0, count)
        return {
            "stored": _errors(loaded, computed),
            "noise": _errors(again, computed),
            "moved": _errors(unmoved, computed[:, 1:]),
        }

    def _blocks_of(self, tokens: int) -> int:
        return -(-tokens // self._paged.block_size)

    def _blocks(self, first: int, tokens: int) -> BlockIds:
        # block 0 is vLLM's null block
        return np.arange(first, first + self._blocks_of(tokens), dtype=np.int32)


def _errors(found: torch.Tensor, expected: torch.Tensor) -> list[list[float]]:
    """By layer, of keys and values: the relative error; one at a time, since float32 takes twice the room."""
    return [
        [
            float((one.float() - other.float()).norm() / other.float().norm().clamp_min(1e-6))
            for one, other in zip(ours, theirs, strict=True)
        ]
        for ours, theirs in zip(found, expected, strict=True)
    ]


__all__ = ["Audit"]
