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

    Every request that waits is asked about in every step, so all but the first question of a step cost next to nothing.

    Args:
        limit: tokens that vLLM computes in a step, at most.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.next_step()

    def next_step(self) -> None:
        """What follows belongs to another step."""
        self._looked = False
        self._answers = False
        self._prefilling = self._blended = 0
        self._somebody_waits = False

    def look(self, live: Iterable[Request]) -> None:
        """See who is running, once a step, before anybody is admitted to it."""
        if self._looked:
            return
        self._looked = True
        for request in live:
            if request.status == RequestStatus.RUNNING:
                left = request.num_prompt_tokens - request.num_computed_tokens
                self._answers = self._answers or left <= 0
                self._prefilling += max(left, 0)

    @property
    def answers(self) -> bool:
        """Whether an answer is running."""
        return self._answers

    @property
    def closed(self) -> bool:
        """Whether somebody waits for the next step already: who came later does not overtake, or a stream of prefills
        would keep a blend waiting for ever."""
        return self._somebody_waits

    def takes_blend(self, tokens: int) -> bool:
        """Whether a blend of so many tokens may be part of this step; else it waits."""
        taken = self._blended + min(self._prefilling, self.limit)
        return self._take(not taken or taken + tokens <= self.limit)

    def takes_plain(self, tokens: int) -> bool:
        """Whether a prefill of so many tokens may begin in this step: not behind a blend that leaves no room."""
        taken = self._take(not self._blended or self._blended + tokens <= self.limit)
        self._prefilling += tokens if taken else 0
        return taken

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

    def _take(self, fits: bool) -> bool:
        self._somebody_waits = self._answers and not fits
        return not self._somebody_waits


__all__ = ["Crowd"]
