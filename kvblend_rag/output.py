"""What a request returns: the fields of vLLM's own outputs, with times that count from submission."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from kvblend_rag.report import BlendReport


@dataclass(frozen=True, kw_only=True)
class RequestMetrics:
    """Times of one request, in seconds since the epoch.

    vLLM stamps scheduling after an asynchronous load; here ``first_scheduled_time`` is the submission, so
    that ``first_token_time - first_scheduled_time`` is the time to first token, loading included.
    """

    first_scheduled_time: float
    first_token_time: float
    finished_time: float

    @property
    def ttft(self) -> float:
        """Time to first token, in seconds."""
        return self.first_token_time - self.first_scheduled_time


@dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One generated text."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Any]] | None = None
    """By generated token: vLLM's ``Logprob`` by token id."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """A request's outputs so far; ``metrics`` and ``report`` are complete when it is finished."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    report: BlendReport = field(default_factory=BlendReport)

    def with_logprobs(self, keep: int | None) -> RequestOutput:
        """The output with log-probabilities of the ``keep`` likeliest tokens a step, and of the drawn one.

        Args:
            keep: how many of those that are there; None: no log-probabilities at all.
        """

        def trimmed(each: CompletionOutput) -> CompletionOutput:
            if keep is None or each.logprobs is None:
                return dataclasses.replace(each, logprobs=None, cumulative_logprob=None)
            steps = [
                {token: choice for token, choice in choices.items() if token == own or (choice.rank or 0) <= keep}
                for own, choices in zip(each.token_ids, each.logprobs, strict=False)
            ]
            return dataclasses.replace(each, logprobs=steps)

        return dataclasses.replace(self, outputs=[trimmed(each) for each in self.outputs])


async def last(outputs: AsyncGenerator[RequestOutput, None]) -> RequestOutput:
    """The last of a request's outputs; cancelled while it waits, it leaves the iteration and so aborts the request."""
    final = None
    async with aclosing(outputs) as iterated:
        async for output in iterated:
            final = output
    assert final is not None
    return final


__all__ = ["CompletionOutput", "RequestMetrics", "RequestOutput", "last"]
