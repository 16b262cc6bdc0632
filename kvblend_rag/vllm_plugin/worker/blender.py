"""Blender: one request on one worker, from stored chunks to a paged cache that is ready for the last token."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from kvblend_rag.errors import ChunkDamaged, KVBlendError
from kvblend_rag.report import TierLoad
from kvblend_rag.selectors import get_selector
from kvblend_rag.selectors.base import Evidence, SelectionInput
from kvblend_rag.selectors.spans import mask_to_ranges
from kvblend_rag.store.encoded import KV
from kvblend_rag.vllm_plugin.metadata import ANOTHER_RANK, DEVICE, BlendJob, Outcome, Recipe
from kvblend_rag.vllm_plugin.worker.carry_over import CarryOver
from kvblend_rag.vllm_plugin.worker.evidence import deviation, deviation_layer, question_attention
from kvblend_rag.vllm_plugin.worker.forward import Row, ScatteredForward
from kvblend_rag.vllm_plugin.worker.hot_chunks import HotChunks
from kvblend_rag.vllm_plugin.worker.loader import Chunks, Loader, Turns, rotated
from kvblend_rag.vllm_plugin.worker.paged_kv import PagedKV
from kvblend_rag.vllm_plugin.worker.ranks import Ranks
from kvblend_rag.vllm_plugin.worker.taps import Taps


class Source(Protocol):
    """Where a blender finds chunks."""

    def get_many(self, keys: Iterable[str], loads: list[TierLoad] | None = None) -> dict[str, tuple[KV, str]]:
        """KV and the name of its tier by key, as ``TieredStore.get_many``."""

    def touch(self, key: str) -> None:
        """Count a use that the device served."""


class Blender:
    """Loads, rotates, scatters, selects and recomputes; every rank does the same.

    Args:
        paged: the paged cache.
        forward: the scattered forward.
        loader: brings chunks into the paged cache.
        store: this rank's chunks.
        hot: those of them that lie on the device.
        context_tokens: length of the ingest context, behind which stored chunks were computed.
        ranks: the tensor-parallel group.
    """

    def __init__(
        self,
        paged: PagedKV,
        forward: ScatteredForward,
        loader: Loader,
        store: Source,
        hot: HotChunks,
        context_tokens: int,
        ranks: Ranks,
    ) -> None:
        self._paged, self._forward, self._loader, self._store, self._hot = paged, forward, loader, store, hot
        self._context_tokens, self._ranks = context_tokens, ranks
        self._taps = Taps([layer.name for layer in paged.layers], loader.wait)

    def blend(self, job: BlendJob) -> Outcome:
        """Fill the request's blocks from ``first`` up to its last prompt token.

        Whatever is wrong with a chunk, the request is computed in full and says why.
        """
        clock: dict[str, float] = {}
        read: list[TierLoad] = []
        with _timed(clock, "load"):
            chunks, tiers, failure = self._read_all(job, read)
        loads = tuple(read)
        if not self._ranks.all_agree(failure is None):
            with _timed(clock, "forward"):
                self._compute(job, [(job.first, job.plan.prompt_tokens - 1)])
            return Outcome(loads=loads, milliseconds=clock, fallback=failure or ANOTHER_RANK)
        selector = get_selector(job.recipe.selector)
        scored, left = 0, None
        before: list[torch.Tensor] = []
        watched = job.recipe.watched and self._forward.tells_next_token
        with _timed(clock, "load"):
            self._loader.fetch(job.plan, chunks)
            turns = Turns(job.plan, self._context_tokens, self._paged.upload)
        if selector.needs <= {Evidence.LOADED}:
            with _timed(clock, "select"):
                recomputed, mask, left = self._select(job, {})
            # What recomputing changes is told by what was stored.
            carried = bool(job.recipe.carry) and not bool(mask.all())
            self._place(job, turns, clock, left_out=None if carried else mask)
        else:
            self._place(job, turns, clock)
            with _timed(clock, "score"):
                evidence, scored = self._gather(job, chunks, turns, selector.needs, before.append if watched else None)
            with _timed(clock, "select"):
                recomputed, _, left = self._select(job, evidence)
        with _timed(clock, "forward"):
            # The last token is vLLM's own to compute; here it is only where its next token is to be compared.
            end = job.plan.prompt_tokens if before else job.plan.prompt_tokens - 1
            computed = [(a, min(b, end)) for a, b in job.plan.computed_ranges()]
            after: list[torch.Tensor] = []
            carry = CarryOver(job, recomputed, self._paged) if job.recipe.carry and recomputed else None
            self._compute(job, _joined([*computed, *recomputed]), after.append if before else None, carry)
            self._loader.wait_for_all()
            moved = self._moved(before[-1], after[-1]) if before else None
        self._hot.offer({key: kv for key, kv in chunks.items() if tiers[key] != DEVICE})
        if _gave_up(job, recomputed, left):
            recipe = job.recipe
            return Outcome(
                fallback=f"covering {recipe.coverage:.0%} of the score needs more than {recipe.full_share:.0%} of the "
                "reused tokens (full_prefill_share): everything was computed",
                scored_tokens=scored,
                loads=loads,
                milliseconds=clock,
            )
        return Outcome(tuple(recomputed), tiers, scored, left, loads, clock, moved=moved)

    def _read_all(self, job: BlendJob, loads: list[TierLoad]) -> tuple[Chunks, dict[str, str], str | None]:
        """The job's chunks and where each came from; or what is wrong with one of them."""
        chunks: Chunks = {}
        tiers: dict[str, str] = {}
        try:
            needed: dict[str, int] = {}
            for run in job.plan.runs:
                needed[run.key] = max(needed.get(run.key, 0), run.chunk_start + run.length)
            hot = self._hot.take(needed)
            slower = self._store.get_many([key for key in needed if key not in hot], loads)
            for key in hot:
                self._store.touch(key)  # else it grows old in the tiers that must keep it
            for key, tokens in needed.items():
                kv, tier = (hot[key], DEVICE) if key in hot else slower[key]
                self._check(key, kv, tokens)
                chunks[key], tiers[key] = kv, tier
        except KVBlendError as error:
            return {}, {}, str(error)
        return chunks, tiers, None

    def _check(self, key: str, kv: KV, tokens: int) -> None:
        """Refuse KV that isn't this model's, or of fewer tokens than are wanted."""
        paged, found = self._paged, tuple(kv.shape)
        shape = paged.chunk_shape(max(tokens, *found[2:3]))
        if found != shape or kv.dtype != paged.dtype:
            raise ChunkDamaged(
                f"The chunk {key} holds {kv.dtype} of shape {found}, and this model needs {paged.dtype} "
                f"of shape {shape}; it was not used."
            )

    def _place(
        self, job: BlendJob, turns: Turns, clock: dict[str, float], left_out: torch.Tensor | None = None
    ) -> None:
        """Start writing the reused tokens' KV, keys rotated to where they stand now.

        Args:
            job: the request.
            turns: its rotations.
            clock: milliseconds by step.
            left_out: (reused tokens,) bool, tokens that will be recomputed.
        """
        before = turns.seconds
        with _timed(clock, "load"):
            slots = self._paged.host_slots(job.block_ids, torch.from_numpy(job.plan.reused_positions()[0]))
            if left_out is not None:
                slots = slots.masked_fill(left_out, -1)
            self._loader.place(slots, turns)
        rotating = (turns.seconds - before) * 1e3
        if rotating:  # nothing where rotation and copy are one kernel
            clock["load"] -= rotating
            clock["rotate"] = clock.get("rotate", 0.0) + rotating

    def _gather(
        self,
        job: BlendJob,
        chunks: Chunks,
        turns: Turns,
        needs: frozenset[Evidence],
        see_last: Callable[[torch.Tensor], None] | None,
    ) -> tuple[dict[str, torch.Tensor], int]:
        """The evidence that a selector needs, and how many tokens it cost."""
        paged, total = self._paged, self._ranks.sum
        evidence: dict[str, torch.Tensor] = {}
        scored = 0
        if Evidence.DEVIATION in needs:
            layer = deviation_layer(paged)
            stored = rotated(job.plan, chunks, turns, paged.layers.index(layer), layer, paged.device)
            gathered, passed = deviation(job, stored, paged, self._forward, self._loader, total)
            evidence.update(gathered)
            scored += passed
        if Evidence.QUESTION_ATTENTION in needs:
            gathered, passed = question_attention(job, paged, self._forward, self._loader, total, see_last)
            evidence.update(gathered)
            scored += passed
        return evidence, scored

    def _select(
        self, job: BlendJob, evidence: dict[str, torch.Tensor]
    ) -> tuple[list[tuple[int, int]], torch.Tensor, float | None]:
        """Prompt ranges to recompute, the same as a mask over the reused tokens, and the score's uncovered share."""
        # Without evidence there is nothing on the device to look at, and nothing to wait for.
        upload = self._paged.upload if evidence else None
        # What positions alone choose is the same on every rank, and a GPU's group takes no tensors of the host.
        agreed = self._ranks.same if evidence else lambda mask: mask
        recipe, selector = job.recipe, get_selector(job.recipe.selector)
        given = SelectionInput.from_plan(
            job.plan,
            recipe.ratio,
            recipe.span,
            coverage=recipe.coverage,
            full_share=recipe.full_share,
            upload=upload,
            **evidence,
        )
        if not job.plan.exact_tokens:
            mask = agreed(selector.select(given))
            return mask_to_ranges(given.positions, mask), mask, selector.uncovered(given, mask)
        exact = [index for index, run in enumerate(job.plan.runs) if run.exact]
        candidates = ~torch.isin(given.run, torch.tensor(exact, device=given.run.device))
        if job.plan.exact_tokens == job.plan.reused_tokens:
            return [], torch.zeros_like(candidates), None
        fewer = given.among(candidates)
        chosen = agreed(selector.select(fewer))
        left = selector.uncovered(fewer, chosen)
        # Where covering takes too much, what is exact is computed with the rest: a full prefill, as the report says.
        everything = _may_give_up(recipe, left) and bool(chosen.all())
        mask = torch.ones_like(candidates) if everything else candidates.masked_scatter(candidates, chosen)
        return mask_to_ranges(given.positions, mask), mask, left

    def _compute(
        self,
        job: BlendJob,
        ranges: Iterable[tuple[int, int]],
        see_last: Callable[[torch.Tensor], None] | None = None,
        carry: CarryOver | None = None,
    ) -> None:
        rows = [Row(job.token_ids, job.block_ids, start, stop) for start, stop in ranges if start < stop]
        if carry is None:
            self._forward.run(rows, around=self._taps, see_last=see_last)
        else:
            taps = Taps([layer.name for layer in self._paged.layers], self._loader.wait, see_new=carry.move)
            self._forward.run(rows, around=taps, see_last=see_last, begin=carry.begin)

    def _moved(self, before: torch.Tensor, after: torch.Tensor) -> float | None:
        """The share of the next token's probability that is elsewhere after recomputing, of two hidden states."""
        then, now = self._forward.next_token(before), self._forward.next_token(after)
        return None if then is None or now is None else float((now - then).clamp_min(0.0).sum())


def _may_give_up(recipe: Recipe, left: float | None) -> bool:
    """Whether there is a score to be covered, and a limit to what that may take."""
    return left is not None and recipe.coverage < 1 and recipe.full_share < 1


def _gave_up(job: BlendJob, recomputed: list[tuple[int, int]], left: float | None) -> bool:
    """Whether an adaptive budget found the score too spread out, and recomputed everything."""
    return _may_give_up(job.recipe, left) and sum(stop - start for start, stop in recomputed) == job.plan.reused_tokens


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
