"""Risk: how likely a blended answer differs from a full prefill's, from what the request shows by itself.

A logistic function of up to five signals, each between 0 and 1. ``kvblend calibrate`` fits it to questions
that were answered both ways; without that a default stands in, whose order is meaningful and whose scale is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvblend_rag.report import BlendReport

EARLY = ("uncovered", "doubt", "moved", "disputed_early")
"""The signals of a stream, before its first token is shown, as ``Signals.features`` names them."""

WHOLE = ("uncovered", "doubt", "moved", "weakest", "disputed")
"""Those of a whole answer."""


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What a request shows; None where it is not known (yet)."""

    uncovered_mass: float | None = None
    """Share of the selector's score outside the recomputed tokens, 0 to 1."""
    moved_mass: float | None = None
    """Share of the first token's probability that recomputing moved, 0 to 1."""
    first_margin: float | None = None
    """Log-probability of the likeliest first token less that of the second, in nats, not negative."""
    lowest_logprob: float | None = None
    """The lowest log-probability of a token of the answer, in nats; None before the answer is there."""
    disputed: float | None = None
    """How far a second answer, with more recomputed, disputes this one, 0 to 1 (``second_opinion``)."""
    disputed_early: float | None = None
    """The same of their first tokens alone, 0 to 1."""

    @classmethod
    def before_the_answer(cls, report: BlendReport) -> Signals:
        """What a report tells, whatever the answer is."""
        return cls(uncovered_mass=report.uncovered_mass, moved_mass=report.moved_mass)

    def features(self) -> dict[str, float]:
        """The known signals, each 0 (no risk) to 1.

        ``uncovered`` and ``moved``, the masses; ``doubt``, the second first token's probability as a share of the
        first's; ``weakest``, one less the least probable answer token's probability; ``disputed`` and
        ``disputed_early``, as they are.
        """
        known = {}
        if self.uncovered_mass is not None:
            known["uncovered"] = self.uncovered_mass
        if self.moved_mass is not None:
            known["moved"] = self.moved_mass
        if self.first_margin is not None:
            known["doubt"] = math.exp(-max(self.first_margin, 0.0))
        if self.lowest_logprob is not None:
            known["weakest"] = -math.expm1(min(self.lowest_logprob, 0.0))
        if self.disputed is not None:
            known["disputed"] = self.disputed
        if self.disputed_early is not None:
            known["disputed_early"] = self.disputed_early
        return known


def margin(choices: Mapping[int, Any]) -> float:
    """Log-probability of a step's likeliest token less that of the second, in nats.

    Args:
        choices: by token, what has a ``logprob``; where one alone is listed, the second has at most the rest.
    """
    ranked = sorted((float(each.logprob) for each in choices.values()), reverse=True)
    second = ranked[1] if len(ranked) > 1 else math.log(max(-math.expm1(ranked[0]), 1e-9))
    return max(ranked[0] - second, 0.0)


def signals_of(token_ids: Sequence[int], steps: Sequence[Mapping[int, Any]] | None, known: Signals) -> Signals:
    """A finished answer's signals.

    Args:
        token_ids: of the answer.
        steps: by generated token, what has a ``logprob`` by token; None where none were asked for.
        known: before the first token.
    """
    pairs = list(zip(token_ids, steps or (), strict=False))
    lowest = min((float(choices[token].logprob) for token, choices in pairs), default=None)
    first = margin(pairs[0][1]) if pairs else None
    return replace(known, first_margin=first, lowest_logprob=lowest)


@dataclass(frozen=True)
class Logistic:
    """1 / (1 + exp(-(intercept + Σ weight × (feature − typical))))."""

    intercept: float
    weights: Mapping[str, float]
    typical: Mapping[str, float] = field(default_factory=dict)
    """What a feature counts as when it is not known: then it says nothing."""

    def __call__(self, features: Mapping[str, float]) -> float:
        """The probability, 0 to 1."""
        total = self.intercept
        for name, weight in self.weights.items():
            typical = self.typical.get(name, 0.5)
            total += weight * (features.get(name, typical) - typical)
        return 1 / (1 + math.exp(-max(min(total, 500.0), -500.0)))


@dataclass(frozen=True)
class RiskModel:
    """Risk before the first token is shown, and of the whole answer."""

    first: Logistic
    answer: Logistic
    calibrated: bool = True
    """False: a default, not fitted to this model."""

    def risk(self, signals: Signals) -> float:
        """0 to 1; of the whole answer where its lowest log-probability is known."""
        return (self.first if signals.lowest_logprob is None else self.answer)(signals.features())

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; ``from_dict`` reads it back."""
        return {name: _plain(getattr(self, name)) for name in ("first", "answer")} | {"calibrated": self.calibrated}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RiskModel:
        """The model a ``to_dict`` was made from."""
        return cls(Logistic(**values["first"]), Logistic(**values["answer"]), bool(values["calibrated"]))


def _plain(logistic: Logistic) -> dict[str, Any]:
    return {
        "intercept": logistic.intercept,
        "weights": dict(logistic.weights),
        "typical": dict(logistic.typical),
    }


_TYPICAL = {"uncovered": 0.5, "doubt": 0.2, "weakest": 0.5, "disputed": 0.3, "disputed_early": 0.3}

DEFAULT_RISK = RiskModel(
    first=Logistic(-1.0, {"uncovered": 1.0, "doubt": 2.0, "disputed_early": 3.0}, _TYPICAL),
    answer=Logistic(-1.0, {"uncovered": 1.0, "doubt": 1.0, "weakest": 3.0, "disputed": 3.0}, _TYPICAL),
    calibrated=False,
)
"""Ranks requests; its numbers are no probabilities until ``kvblend calibrate`` has fitted them."""


__all__ = ["DEFAULT_RISK", "EARLY", "WHOLE", "Logistic", "RiskModel", "Signals", "margin", "signals_of"]
