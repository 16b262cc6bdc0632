"""BlendPlan: which tokens of a prompt are reused, and which are computed.

Every prompt token is *cached* (in vLLM's own prefix cache), *reused* (its KV comes from a stored chunk)
or *computed*. A selector later has some of the reused ones *recomputed*.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvblend_rag.blend.chunk import TokenIds, as_token_ids
from kvblend_rag.blend.match import Match

_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class BlendPlan:
    """What to do with each token of one prompt. Immutable, picklable; holds no token ids."""

    prompt_tokens: int
    runs: tuple[Match, ...]
    """Reused runs, sorted, none overlapping another, none holding the last prompt token."""

    cached: int = 0
    """Leading tokens that are in the prefix cache."""

    context_digest: str = ""
    """Of the prompt's tokens before the question."""

    question_digest: str = ""
    """Of the prompt's tokens from the question on."""

    question: int | None = None
    """Where the question begins, if not right behind the last run: runs behind which it stood are not reused."""

    @property
    def reused_tokens(self) -> int:
        """Tokens whose KV comes from the store, those that will be recomputed among them."""
        return sum(run.length for run in self.runs)

    @property
    def exact_tokens(self) -> int:
        """Reused tokens whose KV is a full prefill's as it is: selectors don't choose among them."""
        return sum(run.length for run in self.runs if run.exact)

    @property
    def computed_tokens(self) -> int:
        """Tokens that are neither cached nor reused."""
        return self.prompt_tokens - self.cached - self.reused_tokens

    @property
    def first_reused(self) -> int | None:
        """Prompt position of the first reused token; None when nothing is reused."""
        return self.runs[0].start if self.runs else None

    @property
    def question_range(self) -> tuple[int, int]:
        """``[start, stop)`` of the question, the end of the computed tail: at least the last token."""
        behind = self.runs[-1].stop if self.runs else self.cached
        return max(behind, self.question or 0), self.prompt_tokens

    def computed_ranges(self) -> list[tuple[int, int]]:
        """Prompt ranges ``[start, stop)`` that are computed, in order, none empty."""
        edges = [
            self.cached,
            *(edge for run in self.runs for edge in (run.start, run.stop)),
            self.prompt_tokens,
        ]
        return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]

    def reused_positions(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Prompt position and index of the run of each reused token; int64, shape (reused_tokens,)."""
        if not self.runs:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        positions = np.concatenate([np.arange(run.start, run.stop) for run in self.runs])
        return positions, np.repeat(np.arange(len(self.runs)), [run.length for run in self.runs])

    def budget(self, ratio: float) -> int:
        """How many reused tokens may be recomputed: never more than ``ratio`` of them.

        Raises:
            ValueError: a ratio outside 0 to 1.
        """
        if not 0 <= ratio <= 1:
            raise ValueError(f"The share of recomputed tokens is {ratio}, and must lie between 0 and 1.")
        # 0.29 * 100 is 28.999…
        return math.floor(ratio * self.reused_tokens + 1e-9)

    def clip(self, first: int, min_run: int = 1) -> BlendPlan:
        """The plan for the tokens from ``first`` on, those before it being in the prefix cache.

        Args:
            first: tokens in the prefix cache; the last prompt token counts as not cached.
            min_run: a run of which less is left is computed.

        Raises:
            ValueError: a negative ``first``.
        """
        if first < 0:
            raise ValueError(f"{first} tokens can't be in the prefix cache.")
        cached = max(self.cached, min(first, self.prompt_tokens - 1))
        return dataclasses.replace(self, cached=cached, runs=_between(self.runs, cached, self.prompt_tokens, min_run))

    def keeping(self, runs: Iterable[Match]) -> BlendPlan:
        """The plan with these of its runs, the others being computed; the question stays what it was."""
        kept = set(runs)
        question = self.question_range[0]
        return dataclasses.replace(self, runs=tuple(run for run in self.runs if run in kept), question=question)

    def digest(
        self,
        selector: str,
        ratio: float,
        span: int,
        *,
        sees_question: bool = True,
        **settings: str | float | bool | None,
    ) -> str:
        """32 hexadecimal digits over everything that determines the blended KV.

        That is the chunks' keys (each stands for model, ingest context, tenant and tokens), which part of
        each stands where, the computed tokens, and how tokens are selected. Take it before ``clip``: how
        much is cached changes nothing, so that the same prompt finds its own blended blocks again.

        Args:
            selector: the selector's name.
            ratio: share of reused tokens that is recomputed.
            span: length of recomputed spans, in tokens.
            sees_question: False when the selection is the same for every question behind the same
                context: then all of them share the blended blocks.
            settings: whatever else changes the KV, JSON-able.
        """
        runs = [(run.key, run.start, run.chunk_start, run.length) for run in self.runs]
        question = (self.prompt_tokens, self.question_digest) if sees_question else None
        parts = [runs, self.context_digest, question, selector, float(ratio), int(span), settings]
        return _digest(json.dumps(parts, sort_keys=True).encode())


def make_plan(
    prompt: Sequence[int] | npt.NDArray[np.integer], matches: Iterable[Match], min_run: int = 16
) -> BlendPlan:
    """The plan for a prompt with these matches; the last prompt token is always computed.

    Args:
        prompt: token ids, int32, shape (tokens,).
        matches: runs found in it, as ``ChunkIndex.match`` returns them.
        min_run: a shorter run is computed, in tokens.

    Raises:
        ValueError: an empty prompt, or matches that overlap or stick out of it.
    """
    tokens = as_token_ids(prompt)
    if not len(tokens):
        raise ValueError("The prompt is empty.")
    runs = sorted(matches, key=lambda run: run.start)
    stop = 0
    for run in runs:
        if not stop <= run.start <= run.stop <= len(tokens):
            raise ValueError(f"A run at [{run.start}, {run.stop}) does not fit between {stop} and {len(tokens)}.")
        stop = run.stop
    plan = BlendPlan(len(tokens), _between(runs, 0, len(tokens) - 1, min_run))
    question = plan.question_range[0]
    return dataclasses.replace(
        plan,
        context_digest=_token_digest(tokens[:question]),
        question_digest=_token_digest(tokens[question:]),
    )


def _between(runs: Iterable[Match], first: int, last: int, min_run: int) -> tuple[Match, ...]:
    """The parts of the runs in ``[first, last)`` that are long enough."""
    parts = []
    for run in runs:
        start, stop = max(run.start, first), min(run.stop, last)
        if stop - start >= max(min_run, 1):
            chunk_start = run.chunk_start + start - run.start
            parts.append(dataclasses.replace(run, start=start, chunk_start=chunk_start, length=stop - start))
    return tuple(parts)


def _token_digest(tokens: TokenIds) -> str:
    return _digest(tokens.astype("<i4").tobytes())


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).hexdigest()


__all__ = ["BlendPlan", "make_plan"]
