"""Second opinion: the same request with more recomputed, and how far its answer disputes the first.

KV nearer to a full prefill's comes nearer to its answer, so an answer that changes with the budget is seldom a full
prefill's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from kvblend_rag.calibration.risk import Signals
from kvblend_rag.config import BlendConfig
from kvblend_rag.output import CompletionOutput
from kvblend_rag.selectors import get_selector

BEGINNING = 8
"""Tokens of a streamed answer that are held back until a second opinion has been asked for as many."""


def second_options(options: Mapping[str, Any], own: BlendConfig) -> dict[str, Any] | None:
    """The second request's blending options.

    Args:
        options: the first's.
        own: its settings.

    Returns:
        None where there is nothing to ask for: no ``second_opinion`` above the first one's budget, or a selector that
        has none.
    """
    if own.second_opinion <= own.recompute_ratio or get_selector(own.selector).share is not None:
        return None
    return {**options, "ratio": own.second_opinion, "coverage": 1.0, "max_risk": 1.0}


def disputed(first: CompletionOutput, second: CompletionOutput) -> float:
    """How far a second answer disputes the first, 0 to 1.

    One half where they part at all, the other the largest share of one of its tokens' probability that the first
    loses in the second: of the tokens up to where they part, and of the one with which they do. Where the second
    one's listed choices leave that out, it has at most the least of theirs.

    Args:
        first: an answer with the log-probabilities of its tokens.
        second: another, with those of at least one likely token a step.
    """
    lost = 0.0
    parted = first.token_ids != second.token_ids
    steps = zip(first.token_ids, first.logprobs or (), second.token_ids, second.logprobs or (), strict=False)
    for token, choices, other, theirs in steps:
        then, now = float(choices[token].logprob), _at_most(token, theirs)
        lost = max(lost, -math.expm1(min(now - then, 0.0)))
        if token != other:
            break
    return (parted + lost) / 2


def beginning(answer: CompletionOutput) -> CompletionOutput:
    """The first tokens of an answer, as many as a second opinion on a stream has; the text stays as it is."""
    steps = None if answer.logprobs is None else answer.logprobs[:BEGINNING]
    return dataclasses.replace(answer, token_ids=answer.token_ids[:BEGINNING], logprobs=steps)


def with_second(signals: Signals, first: CompletionOutput, second: CompletionOutput) -> Signals:
    """An answer's signals, with what a second one, as long, tells of it: of all of it and of its first tokens."""
    early = disputed(beginning(first), beginning(second))
    return dataclasses.replace(signals, disputed=disputed(first, second), disputed_early=early)


def _at_most(token: int, choices: Mapping[int, Any]) -> float:
    """Log-probability of a token, or what it can't exceed where it is not listed."""
    if token in choices:
        return float(choices[token].logprob)
    listed = [float(each.logprob) for each in choices.values()]
    rest = math.log(max(1 - math.fsum(map(math.exp, listed)), 1e-9))
    return min(*listed, rest)


__all__ = ["BEGINNING", "beginning", "disputed", "second_options", "with_second"]
