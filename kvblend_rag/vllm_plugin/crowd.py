"""Crowd: how much a step may take on while answers are running.

A blend costs vLLM's scheduler one token, whatever it computes, so nothing of vLLM's own would keep it from admitting
many in one step, or one beside a full chunk of an ordinary prefill. While answers are running, all of it together
stays below what vLLM lets a step compute: then no token of theirs waits longer than for a chunk of a prefill.
"""

from __future__ import annotations

from collections.abc import Iterable

from vllm.v1.request import Request, RequestStatus


class Crowd:
    """What the step that is being scheduled has taken on.

    Args:
        limit: tokens that vLLM computes in a step, at most.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._blended = 0
        self._somebody_waits = False

    def answers(self, request: Request, others: Iterable[Request]) -> bool:
        """Whether another request's answer is running."""
        return any(
            other is not request
            and other.status == RequestStatus.RUNNING
            and other.num_computed_tokens >= other.num_prompt_tokens
            for other in others
        )

    def holds_up(self, request: Request, tokens: int, others: Iterable[Request]) -> bool:
        """Whether a blend of so many tokens must wait for another step."""
        others = list(others)
        taken = self._blended + min(_prefilling(request, others), self.limit)
        return self._wait(request, others, bool(taken) and taken + tokens > self.limit)

    def holds_up_plain(self, request: Request, cached: int, others: Iterable[Request]) -> bool:
        """Whether a request that is not blended must wait for another step: behind a blend, or one that waits."""
        others = list(others)
        tokens = request.num_prompt_tokens - cached
        return self._wait(request, others, bool(self._blended) and self._blended + tokens > self.limit)

    def too_large(self, tokens: int) -> str | None:
        """Why a blend of so many tokens would hold up running answers by itself, if it would."""
        if tokens <= self.limit:
            return None
        return (
            f"blending would compute {tokens:,} tokens in one step and hold up running answers: it was computed in "
            f"steps of {self.limit:,}"
        )

    def admit(self, tokens: int) -> None:
        """A blend of so many tokens is part of this step."""
        self._blended += tokens

    def next_step(self) -> None:
        """What follows belongs to another step."""
        self._blended, self._somebody_waits = 0, False

    def _wait(self, request: Request, others: list[Request], full: bool) -> bool:
        # Who came later does not overtake: a stream of prefills would keep a blend waiting for ever.
        waits = (full or self._somebody_waits) and self.answers(request, others)
        self._somebody_waits = self._somebody_waits or waits
        return waits


def _prefilling(request: Request, others: Iterable[Request]) -> int:
    """Prompt tokens of running requests that are not computed yet."""
    return sum(
        max(other.num_prompt_tokens - other.num_computed_tokens, 0)
        for other in others
        if other is not request and other.status == RequestStatus.RUNNING
    )


__all__ = ["Crowd"]
