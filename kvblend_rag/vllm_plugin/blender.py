"""Blender: one request on one worker, from stored chunks to a paged cache that is ready for the last token."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from kvblend_rag.blend.rope import rotate, shift
from kvblend_rag.errors import ChunkDamaged, KVBlendError
from kvblend_rag.selectors import get_selector
from kvblend_rag.selectors.base import Evidence, SelectionInput
from kvblend_rag.selectors.spans import mask_to_ranges
from kvblend_rag.store import TieredStore
from kvblend_rag.vllm_plugin.evidence import deviation, deviation_layer, question_attention, reused_slots
from kvblend_rag.vllm_plugin.forward import Row, ScatteredForward
from kvblend_rag.vllm_plugin.metadata import BlendJob, Outcome
from kvblend_rag.vllm_plugin.paged_kv import PagedKV
from kvblend_rag.vllm_plugin.ranks import Ranks

Layered = list[tuple[torch.Tensor, torch.Tensor]]
"""By layer: keys and values of the reused tokens, each (tokens, kv_heads, head_dim)."""


class Blender:
    """Loads, rotates, scatters, selects and recomputes; every rank does the same.

    Args:
        paged: the paged cache.
        forward: the scattered forward.
        store: this rank's chunks.
        context_tokens: length of the ingest context, behind which stored chunks were computed.
        ranks: the tensor-parallel group.
    """

    def __init__(
        self, paged: PagedKV, forward: ScatteredForward, store: TieredStore, context_tokens: int, ranks: Ranks
    ) -> None:
        self._paged, self._forward, self._store = paged, forward, store
        self._context_tokens, self._ranks = context_tokens, ranks

    def blend(self, job: BlendJob) -> Outcome:
        """Fill the request's blocks from ``first`` up to its last prompt token.

        Whatever is wrong with a chunk, the request is computed in full and says why.
        """
        clock: dict[str, float] = {}
        failure, chunks, tiers = None, {}, {}
        with _timed(clock, "load"):
            try:
                for key in dict.fromkeys(run.key for run in job.plan.runs):
                    chunks[key], tiers[key] = self._read(key)
            except KVBlendError as error:
                failure = str(error)
        if not self._ranks.all_agree(failure is None):
            with _timed(clock, "forward"):
                self._compute(job, [(job.first, job.plan.prompt_tokens - 1)])
            return Outcome(milliseconds=clock, fallback=failure or "another rank could not load its part of a chunk")
        with _timed(clock, "load"):
            loaded = self._load(job, chunks)
        needs = get_selector(job.recipe.selector).needs
        evidence: dict[str, torch.Tensor] = {}
        scored = 0
        with _timed(clock, "score"):
            if Evidence.DEVIATION in needs:
                at = self._paged.layers.index(deviation_layer(self._paged))
                gathered, passed = deviation(job, loaded[at], self._paged, self._forward, self._ranks.sum)
                evidence.update(gathered)
                scored += passed
            if Evidence.QUESTION_ATTENTION in needs:
                gathered, passed = question_attention(job, self._paged, self._forward, self._ranks.sum)
                evidence.update(gathered)
                scored += passed
        with _timed(clock, "select"):
            recomputed = self._select(job, evidence)
        with _timed(clock, "forward"):
            computed = [(a, min(b, job.plan.prompt_tokens - 1)) for a, b in job.plan.computed_ranges()]
            self._compute(job, _joined([*computed, *recomputed]))
        return Outcome(recomputed=tuple(recomputed), tiers=tiers, scored_tokens=scored, milliseconds=clock)

    def _read(self, key: str) -> tuple[torch.Tensor, str]:
        kv, tier = self._store.get_with_tier(key)
        layers, paged = len(self._paged.layers), self._paged
        shape = (layers, 2, kv.shape[2], paged.heads, paged.head_dim)
        if tuple(kv.shape) != shape or kv.dtype != paged.dtype:
            raise ChunkDamaged(
                f"The chunk {key} holds {kv.dtype} of shape {tuple(kv.shape)}, and this model needs {paged.dtype} "
                f"of shape {shape}; it was not used."
            )
        return kv, tier

    def _load(self, job: BlendJob, chunks: dict[str, torch.Tensor]) -> Layered:
        """Write the reused tokens' KV into the paged cache, keys rotated to where they stand now."""
        paged, runs = self._paged, job.plan.runs
        slots = reused_slots(job.plan, job.block_ids, paged)
        new = torch.cat([torch.arange(run.start, run.stop) for run in runs]).to(paged.device)
        stored = torch.cat([torch.arange(run.chunk_start, run.chunk_start + run.length) for run in runs])
        stored = stored.to(paged.device) + self._context_tokens
        shifts: dict[tuple[int, bool], tuple[torch.Tensor, torch.Tensor]] = {}
        loaded: Layered = []
        for index, layer in enumerate(paged.layers):
            parts = [chunks[run.key][index, :, run.chunk_start : run.chunk_start + run.length] for run in runs]
            keys, values = torch.cat(parts, dim=1).to(paged.device, non_blocking=True)
            if layer.rotary is not None:
                which = (layer.rotary.table.data_ptr(), layer.rotary.interleaved)
                if which not in shifts:
                    shifts[which] = shift(layer.rotary, stored, new)
                keys = rotate(keys, *shifts[which], layer.rotary.interleaved)
            paged.write(layer, keys, values, slots)
            loaded.append((keys, values))
        return loaded

    def _select(self, job: BlendJob, evidence: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
        given = SelectionInput.from_plan(
            job.plan, job.recipe.ratio, job.recipe.span, device=self._paged.device, **evidence
        )
        mask = self._ranks.same(get_selector(job.recipe.selector).select(given))
        return mask_to_ranges(given.positions, mask)

    def _compute(self, job: BlendJob, ranges: Iterable[tuple[int, int]]) -> None:
        self._forward.run(Row(job.token_ids, job.block_ids, start, stop) for start, stop in ranges if start < stop)


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted ranges, those that touch made one: one row for the attention backend instead of two."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if start >= stop:
            continue
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


@contextmanager
def _timed(clock: dict[str, float], step: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    clock[step] = clock.get(step, 0.0) + (time.perf_counter() - started) * 1e3


__all__ = ["Blender"]
