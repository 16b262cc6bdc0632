"""An answer against what is accepted, and a distribution against the one of a full prefill.

Normalisation, exact match and F1 are SQuAD's (https://rajpurkar.github.io/SQuAD-explorer): lower case,
no punctuation, no articles, single spaces.
"""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
# What is left of a probability mass after float32 sums of log-probabilities is not more exact than this.
_LEAST_REST = 1e-6


def normalised(text: str) -> str:
    """SQuAD's normal form."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1 when the answer is one of those accepted, 0 otherwise."""
    return float(any(normalised(answer) == normalised(each) for each in accepted))


def f1(answer: str, accepted: Sequence[str]) -> float:
    """The best overlap of words with an accepted answer, 0 to 1."""
    return max((_overlap(normalised(answer).split(), normalised(each).split()) for each in accepted), default=0.0)


def _overlap(given: Sequence[str], wanted: Sequence[str]) -> float:
    if not given or not wanted:
        return float(given == wanted)
    shared = (collections.Counter(given) & collections.Counter(wanted)).total()
    return 2 * shared / (len(given) + len(wanted))


@dataclass(frozen=True)
class Distribution:
    """The likeliest next tokens at one position; what is not listed is one bucket."""

    tokens: npt.NDArray[np.int64]
    """Shape (k,), ascending."""
    logprobs: npt.NDArray[np.float64]
    """Shape (k,), in nats."""

    @classmethod
    def of(cls, logprobs: dict[int, float]) -> Distribution:
        """From log-probabilities by token."""
        tokens = np.fromiter(logprobs, np.int64, len(logprobs))
        order = np.argsort(tokens)
        return cls(tokens[order], np.fromiter(logprobs.values(), np.float64, len(logprobs))[order])


def kl(reference: Distribution, other: Distribution) -> float:
    """KL(reference ‖ other) in nats, from below: tokens that both list stand alone, the rest in two buckets.

    The buckets are what only ``other`` lists, and what it does not list. A partition's KL is never above the
    whole vocabulary's; how the reference's rest divides between the buckets is not known where it does not
    list them either, and the division that gives the least is taken.
    """
    _, ours, theirs = np.intersect1d(reference.tokens, other.tokens, assume_unique=True, return_indices=True)
    p, q = np.exp(reference.logprobs), np.exp(other.logprobs)
    shared = float(np.sum(p[ours] * (reference.logprobs[ours] - other.logprobs[theirs])))
    rest = max(1.0 - float(p[ours].sum()), _LEAST_REST)
    listed = max(float(q.sum() - q[theirs].sum()), 0.0)
    unlisted = max(1.0 - float(q.sum()), _LEAST_REST)
    among_listed = min(max(1.0 - float(p.sum()), 0.0), rest * listed / (listed + unlisted))
    buckets = ((among_listed, listed), (rest - among_listed, unlisted))
    return max(shared + sum(mass * float(np.log(mass / other_mass)) for mass, other_mass in buckets if mass > 0), 0.0)


__all__ = ["Distribution", "exact_match", "f1", "kl", "normalised"]
