"""Rehearsal: forward passes and blends of random tokens, timed before the first request.

What a blend costs depends on the model, the device and the layout of the cache, and a first blend also allocates
and compiles. So it is tried, in free blocks, on chunks that nobody stored.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from kvblend_rag.blend.cost import ForwardPace, Pace, Work, blend_seconds
from kvblend_rag.blend.match import Match
from kvblend_rag.blend.plan import BlendPlan
from kvblend_rag.report import TierLoad
from kvblend_rag.selectors.base import Evidence
from kvblend_rag.store.encoded import KV, encoded
from kvblend_rag.store.encoding import Encoding
from kvblend_rag.vllm_plugin.effort import effort_of
from kvblend_rag.vllm_plugin.metadata import BlendJob, Outcome, Recipe
from kvblend_rag.vllm_plugin.worker.evidence import shares
from kvblend_rag.vllm_plugin.worker.forward import Row, ScatteredForward
from kvblend_rag.vllm_plugin.worker.paged_kv import PagedKV
from kvblend_rag.vllm_plugin.worker.ranks import Ranks

logger = logging.getLogger(__name__)

_SECONDS = 0.1
"""A pass is as long as this allows: the reader's 150 tokens on two cores."""

_FEWEST, _MOST = 64, 8192
_LEAST_ROOM = 128
"""Tokens: a shorter context has no prompts of several chunks."""

_HEADER, _QUESTION = 16, 32
_USUAL = 256
"""Tokens of a chunk, where its size matters."""
_ROUNDS, _MOST_ROUNDS = 4, 32
_ROUNDS_SECONDS = 0.5
"""The least time counts, of at least four rounds and of as many as this allows: what disturbs the machine for a tenth
of a second spoils a few rounds of a tiny model, and in each of them everything alike."""


class Shelf:
    """Chunks of random KV in place of a store.

    Args:
        paged: whose chunks they are.
        encoding: as which the store gives them.
    """

    def __init__(self, paged: PagedKV, encoding: Encoding = "none") -> None:
        self._paged, self._encoding = paged, encoding
        self._kv: dict[str, KV] = {}

    def put(self, key: str, tokens: int) -> None:
        """Keep a chunk of so many tokens."""
        paged = self._paged
        kv = encoded(torch.zeros(paged.chunk_shape(tokens), dtype=paged.dtype).normal_(), self._encoding)
        self._kv[key] = kv.pin_memory() if paged.device.type == "cuda" else kv

    def token_bytes(self) -> int:
        """Bytes of a token, in a chunk of a usual length."""
        layers, *rest = self._paged.chunk_shape(_USUAL)
        layer = encoded(torch.zeros((1, *rest), dtype=self._paged.dtype), self._encoding)
        return layers * layer.nbytes // _USUAL

    def get_many(self, keys: Iterable[str], loads: list[TierLoad] | None = None) -> dict[str, tuple[KV, str]]:
        """As ``TieredStore.get_many``."""
        return {key: (self._kv[key], "memory") for key in keys}

    def touch(self, key: str) -> None:
        """Nothing grows old here."""


class Rehearsal:
    """Times one worker; every rank does the same.

    Args:
        paged: the paged cache; its first blocks are written to.
        forward: computes.
        blend: of a blender over ``shelf``.
        shelf: where the blender finds chunks.
        ranks: which all compute the same passes, as often.
        blocks: of the cache.
        max_model_len: positions that the model knows.
        vocabulary: token ids are below it.
    """

    def __init__(
        self,
        paged: PagedKV,
        forward: ScatteredForward,
        blend: Callable[[BlendJob], Outcome],
        shelf: Shelf,
        ranks: Ranks,
        *,
        blocks: int,
        max_model_len: int,
        vocabulary: int,
    ) -> None:
        self._paged, self._forward, self._blend, self._shelf = paged, forward, blend, shelf
        self._ranks = ranks
        self._room = min(max_model_len - 1, (blocks - 1) * paged.block_size)
        generator = np.random.default_rng(0)
        self._tokens = generator.integers(3, vocabulary, self._room).astype(np.int32)
        self._blocks = np.arange(1, 1 + -(-self._room // paged.block_size), dtype=np.int32)

    @torch.inference_mode()
    def run(self, recipe: Recipe) -> Pace | None:
        """The engine's pace, with blends as the recipe says; None where there is no room to try, or trying fails."""
        if self._room < _LEAST_ROOM:
            return None
        try:
            return self._pace(recipe)
        except RuntimeError as error:  # torch's, out of memory among them
            logger.warning("kvblend plans nothing and loads whatever it finds: its rehearsal failed (%s).", error)
            return None

    def _pace(self, recipe: Recipe) -> Pace:
        count = self._size()
        shapes = self._shapes(count)
        plans = [self._plan(chunks, max(count // 4, 16)) for chunks in (1, 4)]
        jobs = [BlendJob("rehearsal", self._tokens, self._blocks, 0, plan, recipe) for plan in plans]
        passes = [functools.partial(self._pass, ranges) for ranges in [[(0, 1)], *shapes]]
        least, *seconds = self._timed([*passes, *(functools.partial(self._blend, job) for job in jobs)])
        samples = list(zip(map(Work.of, shapes), seconds, strict=False))
        share = shares(self._paged)
        most_at_once = {"max_tokens": self._forward.max_tokens, "max_rows": self._forward.max_rows}
        pace = Pace(
            ForwardPace.fit(samples, least=least, **most_at_once),
            blend=0.0,
            placed=0.0,
            token_bytes=self._shelf.token_bytes(),
            question_share=share[Evidence.QUESTION_ATTENTION],
            deviation_share=share[Evidence.DEVIATION],
            middle_share=shares(self._paged, "middle")[Evidence.QUESTION_ATTENTION],
        )
        effort = effort_of(recipe, pace)
        over = []
        for plan, taken in zip(plans, seconds[len(shapes) :], strict=True):
            last = pace.forward.seconds(Work.of([(plan.prompt_tokens - 1, plan.prompt_tokens)]))
            over.append((plan.reused_tokens, taken - (blend_seconds(plan, effort, pace) - last)))
        (few, short), (many, long) = over
        placed = max((long - short) / (many - few), 0.0)
        fixed = max(short - placed * few, 0.0)
        return dataclasses.replace(pace, blend=fixed, placed=placed)

    def _size(self) -> int:
        """Tokens of a pass that is long enough to be measured, and no longer.

        Found step by step: on a GPU a short pass takes no less time than a longer one, and tells nothing of it.
        """
        most = min(_MOST, self._forward.max_tokens, self._room - _HEADER - _QUESTION)
        count = min(_FEWEST, most)
        while count < most:
            (seconds,) = self._timed([functools.partial(self._pass, [(0, count)])])
            enough = self._ranks.least(max(min(int(count * _SECONDS / max(seconds, 1e-9)), most), count))
            if enough < 2 * count:
                return enough
            count = enough
        return count

    def _shapes(self, count: int) -> list[list[tuple[int, int]]]:
        """A short pass, a long one, one far behind, and one of many short rows.

        The short one is a quarter of the long one, since a GPU does a sixteenth as fast as a single token.
        """
        far, few = self._room - count, max(count // 4, 1)
        rows = min(self._forward.max_rows, count // 16, self._room // 32) or 1
        step = self._room // rows
        return [
            [(0, few)],
            [(0, count)],
            [(far, far + count)],
            [(index * step, index * step + count // rows) for index in range(rows)],
        ]

    def _pass(self, ranges: Iterable[tuple[int, int]]) -> None:
        self._forward.run([Row(self._tokens, self._blocks, start, stop) for start, stop in ranges])

    def _plan(self, chunks: int, tokens: int) -> BlendPlan:
        tokens = min(tokens, (self._room - _HEADER - _QUESTION) // chunks - 1)
        runs = []
        for index in range(chunks):
            key = f"rehearsal {chunks} {index}"
            self._shelf.put(key, tokens)
            runs.append(Match(key, _HEADER + index * (tokens + 1), 0, tokens))
        return BlendPlan(runs[-1].stop + _QUESTION, tuple(runs))

    def _timed(self, acts: Sequence[Callable[[], object]]) -> list[float]:
        """The least seconds of each, done in turn; the first round is not counted."""
        least = [math.inf] * len(acts)
        done, rounds = 0, 1
        while done <= rounds:
            began = time.perf_counter()
            for index, act in enumerate(acts):
                self._wait()
                started = time.perf_counter()
                act()
                self._wait()
                if done:
                    least[index] = min(least[index], time.perf_counter() - started)
            if done == 1:
                wanted = int(_ROUNDS_SECONDS / max(time.perf_counter() - began, 1e-9))
                rounds = self._ranks.least(min(max(wanted, _ROUNDS), _MOST_ROUNDS))
            done += 1
        return least

    def _wait(self) -> None:
        if self._paged.device.type == "cuda":
            torch.cuda.synchronize()


__all__ = ["Rehearsal", "Shelf"]
