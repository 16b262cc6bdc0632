"""Selector: chooses which reused tokens are computed again.

A selector is a pure function of positions and evidence. What evidence costs: ``LOADED`` nothing,
``QUESTION_ATTENTION`` a first pass of the question (3 % of a prefill), ``DEVIATION`` the first layers of
all reused tokens.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from kvblend_rag.blend.plan import BlendPlan


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

    question_mass: torch.Tensor | None = None
    """float32: attention from all question tokens, mean over heads and a few middle layers."""

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

    @classmethod
    def from_plan(
        cls,
        plan: BlendPlan,
        ratio: float,
        span: int,
        *,
        device: torch.device | str = "cpu",
        **evidence: torch.Tensor | None,
    ) -> SelectionInput:
        """The input for a plan's reused tokens, a share ``ratio`` of which may be recomputed."""
        positions, run = (torch.from_numpy(array).to(device) for array in plan.reused_positions())
        return cls(positions=positions, run=run, budget=plan.budget(ratio), span=span, **evidence)

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

    @abstractmethod
    def select(self, given: SelectionInput) -> torch.Tensor:
        """Which tokens are recomputed: bool, shape (R,), on the input's device, at most ``budget`` true."""


__all__ = ["Evidence", "SelectionInput", "Selector"]
