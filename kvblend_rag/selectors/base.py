"""Selector: chooses which reused tokens are computed again.

A selector is a pure function of positions and evidence. What evidence costs: ``LOADED`` nothing,
``QUESTION_ATTENTION`` a first pass of the question (3 % of a prefill), ``DEVIATION`` the first layers of
all reused tokens.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvblend_rag.blend.plan import BlendPlan
from kvblend_rag.selectors.spans import choose_spans, uncovered


class Evidence(enum.Enum):
    """What the worker gathers before it selects."""

    LOADED = "loaded"
    """Nothing more than the positions."""

    QUESTION_ATTENTION = "question_attention"
    """Attention of a first pass of the question: ``question_mass`` and ``last_mass``."""

    DEVIATION = "deviation"
    """First layers computed with full attention under the right mask: ``key_deviation``,
    ``value_deviation``."""


@dataclass(frozen=True, kw_only=True)
class SelectionInput:
    """What a selector sees: R reused tokens in prompt order, and what was gathered about them.

    All tensors have shape (R,) and are on one device; evidence that was not gathered is None.
    """

    positions: torch.Tensor
    """int64: prompt position of each reused token, ascending."""

    run: torch.Tensor
    """int64: index of the run each token is in, ascending."""

    budget: int
    """Tokens that may be recomputed."""

    span: int
    """Tokens in a span."""

    coverage: float = 1.0
    """Share of the score's mass that is enough, 0 to 1; at 1 the whole budget is spent."""

    full_share: float = 1.0
    """Share of the reused tokens beyond which covering that much is not worth it: everything is recomputed."""

    question_mass: torch.Tensor | None = None
    """float32: attention from all question tokens, mean over heads and the layers looked at."""

    last_mass: torch.Tensor | None = None
    """float32: the same from the last prompt token alone."""

    key_deviation: torch.Tensor | None = None
    """float32: squared distance of recomputed and loaded keys, summed over heads and dimensions."""

    value_deviation: torch.Tensor | None = None
    """float32: the same for values."""

    def __post_init__(self) -> None:
        if self.budget < 0 or self.span < 1:
            raise ValueError(f"budget is {self.budget} and span {self.span}; they must be at least 0 and 1.")
        for name in ("run", "question_mass", "last_mass", "key_deviation", "value_deviation"):
            given = getattr(self, name)
            if given is not None and given.shape != self.positions.shape:
                raise ValueError(f"{name} has shape {tuple(given.shape)}, and positions {tuple(self.positions.shape)}.")

    def among(self, candidates: torch.Tensor) -> SelectionInput:
        """The same budget for some of the tokens alone.

        Args:
            candidates: bool, shape (R,), on the input's device.
        """
        evidence = ("question_mass", "last_mass", "key_deviation", "value_deviation")
        given = {name: getattr(self, name) for name in evidence}
        left: dict[str, Any] = {name: None if each is None else each[candidates] for name, each in given.items()}
        positions = self.positions[candidates]
        budget = min(self.budget, len(positions))
        return replace(self, positions=positions, run=self.run[candidates], budget=budget, **left)

    @classmethod
    def from_plan(
        cls,
        plan: BlendPlan,
        ratio: float,
        span: int,
        *,
        coverage: float = 1.0,
        full_share: float = 1.0,
        upload: Callable[[torch.Tensor], torch.Tensor] | None = None,
        **evidence: torch.Tensor | None,
    ) -> SelectionInput:
        """The input for a plan's reused tokens, a share ``ratio`` of which may be recomputed.

        Args:
            plan: the request's.
            ratio: 0 to 1.
            span: tokens in a span.
            coverage: as the attribute.
            full_share: as the attribute.
            upload: takes positions to the device of the evidence; None leaves them on the host.
            evidence: by name, each of shape (R,).
        """
        positions, run = map(torch.from_numpy, plan.reused_positions())
        if upload is not None:
            positions, run = upload(positions), upload(run)
        return cls(
            positions=positions,
            run=run,
            budget=plan.budget(ratio),
            span=span,
            coverage=coverage,
            full_share=full_share,
            **evidence,
        )

    def evidence(self, name: str) -> torch.Tensor:
        """One piece of evidence, float32, shape (R,).

        Raises:
            ValueError: it was not gathered.
        """
        found = getattr(self, name)
        if found is None:
            raise ValueError(f"{name} was not gathered; the selector must name it in `needs`.")
        assert isinstance(found, torch.Tensor)
        return found


class Selector(ABC):
    """One way to choose the tokens that are recomputed. Stateless, and the same on every rank."""

    name: str
    """What it is called in the configuration."""

    needs: frozenset[Evidence] = frozenset({Evidence.LOADED})
    """The evidence that must be in the input."""

    share: float | None = None
    """Of the reused tokens that it recomputes whatever the budget; None: the budget's."""

    @abstractmethod
    def select(self, given: SelectionInput) -> torch.Tensor:
        """Which tokens are recomputed: bool, shape (R,), on the input's device, at most ``budget`` true."""

    def uncovered(self, given: SelectionInput, chosen: torch.Tensor) -> float | None:
        """The share of the score's mass outside the chosen tokens; None where no score was made."""
        return None


class ScoringSelector(Selector):
    """Scores tokens and takes the best spans: the whole budget, or what covers enough of the score's mass.

    Where the mass is concentrated, a little covers it; where it is spread, as for a question about all
    documents, much is needed, and beyond ``full_share`` everything is recomputed: a full prefill.
    """

    @abstractmethod
    def scores(self, given: SelectionInput) -> torch.Tensor:
        """How much each token matters: float, shape (R,), not negative."""

    def select(self, given: SelectionInput) -> torch.Tensor:
        """The spans of the highest mean score."""
        return choose_spans(self.scores(given), given.run, given.budget, given.span, given.coverage, given.full_share)

    def uncovered(self, given: SelectionInput, chosen: torch.Tensor) -> float | None:
        """See :meth:`Selector.uncovered`."""
        return uncovered(self.scores(given), chosen)


__all__ = ["Evidence", "ScoringSelector", "SelectionInput", "Selector"]
