"""One observation against the full prefill's of the same question, as a few numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvblend_rag.quality.metrics import exact_match, f1, kl, normalised
from kvblend_rag.quality.observe import Observation, Observations
from kvblend_rag.quality.questions import Question
from kvblend_rag.report import BlendReport


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question in one way: how good, how faithful, at what cost."""

    exact: float
    """1 when the answer is an accepted one."""
    f1: float
    same: float
    """1 when the answer is the full prefill's, normalised."""
    nll: float
    """Negative log-likelihood of the gold answer, nats a token."""
    kl: float
    """KL of the full prefill's next-token distributions to these, mean over the gold answer's positions."""
    recomputed: float
    """Recomputed chunk tokens among the chunk tokens found; 1 where the prompt was computed in full."""
    computed: float
    """Prompt tokens run through the whole model, among those that vLLM's own prefix cache did not hold."""
    scored: float
    """Tokens run through the model only to choose, in the same unit."""
    blended: float
    """1 when stored KV was used."""
    uncovered: float = math.nan
    """Signals of risk, ``Signals.features``; NaN where one is not known."""
    doubt: float = math.nan
    moved: float = math.nan
    weakest: float = math.nan
    disputed: float = math.nan
    disputed_early: float = math.nan


def score(question: Question, observed: Observation, plain: Observation) -> Sample:
    """An observation as numbers; ``plain`` is the full prefill's of the same question."""
    found, computed, scored = _cost(observed.report)
    steps = [kl(ours, theirs) for ours, theirs in zip(plain.distributions, observed.distributions, strict=True)]
    return Sample(
        exact=exact_match(observed.answer, question.answers),
        f1=f1(observed.answer, question.answers),
        same=float(normalised(observed.answer) == normalised(plain.answer)),
        nll=-sum(observed.logprobs) / len(observed.logprobs),
        kl=sum(steps) / len(steps),
        recomputed=found,
        computed=computed,
        scored=scored,
        blended=float(observed.report.blended),
        **observed.signals.features(),
    )


def score_all(questions: list[Question], observed: Observations, plain: list[Observation]) -> dict[str, list[Sample]]:
    """Observations as numbers, by arm; an arm may hold those of further questions behind the given ones."""
    return {
        arm: [score(*each) for each in zip(questions, several, plain, strict=False)]
        for arm, several in observed.items()
    }


def _cost(report: BlendReport) -> tuple[float, float, float]:
    """Shares that were recomputed, computed and scored."""
    fresh = report.prompt_tokens - report.cached_tokens
    if not report.blended or not fresh:
        return 1.0, 1.0, 0.0
    found = report.reused_tokens + report.recomputed_tokens
    return (
        report.recomputed_tokens / found if found else 1.0,
        (report.computed_tokens + report.recomputed_tokens) / fresh,
        report.scored_tokens / fresh,
    )


__all__ = ["Sample", "score", "score_all"]
