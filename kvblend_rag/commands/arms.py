"""One measured request: the prefix cache emptied, the system prompt warmed, then the prompt."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from kvblend_rag.demo.prompt import SYSTEM_PROMPT

if TYPE_CHECKING:
    from kvblend_rag.llm import LLM
    from kvblend_rag.output import RequestOutput


class Arms:
    """Asks an engine the same thing in different ways, each from the same start.

    Without the reset, a second arm would find the first one's blocks in vLLM's prefix cache.

    Args:
        llm: the engine.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        system = {"role": "system", "content": SYSTEM_PROMPT}
        one, other = (llm.render([system, {"role": "user", "content": text}]) for text in ("a", "b"))
        shared = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
        self._header = one[: max(shared, 1)]

    def ask(self, prompt: Sequence[int], sampling: Any, **blend: Any) -> RequestOutput:
        """One request alone, from a prefix cache that holds the system prompt and nothing else."""
        engine = self._llm.kvblend.engine
        engine.run(engine.reset_prefix_cache())
        self._llm.generate([self._header], engine.one_token(), blend={"blend": False})
        return self._llm.generate([list(prompt)], sampling, blend=blend)[0]

    def warm_up(self, prompt: Sequence[int], *options: dict[str, Any]) -> None:
        """Answer once in each way, unmeasured: the first of its kind allocates, compiles and loads."""
        for each in options or ({"blend": False}, {}):
            self.ask(prompt, greedy(2), **each)


def greedy(max_tokens: int, **more: Any) -> Any:
    """Sampling parameters of a deterministic answer."""
    from kvblend_rag import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **more)


def seconds(output: RequestOutput) -> float:
    """Time from submission to first token."""
    assert output.metrics is not None
    return output.metrics.ttft


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, least and greatest."""
    ordered = sorted(values)
    return {"median": statistics.median(ordered), "min": ordered[0], "max": ordered[-1]}


__all__ = ["Arms", "greedy", "seconds", "spread"]
