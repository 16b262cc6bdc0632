"""Tokens whose KV changes most in context are recomputed (CacheBlend, https://arxiv.org/abs/2405.16444)."""

from __future__ import annotations

from typing import Literal

import torch

from kvblend_rag.selectors.base import Evidence, ScoringSelector, SelectionInput


class DeviationSelector(ScoringSelector):
    """The deviation in a first layer tells which tokens attend to other chunks.

    The paper picks single tokens (``span`` 1) and narrows its choice from layer to layer; this is its
    choice at the layer the worker measured.
    """

    name = "deviation"
    needs = frozenset({Evidence.DEVIATION})

    def __init__(self, of: Literal["value", "key"] = "value") -> None:
        """Args: whether values (as in the paper's code) or keys are compared."""
        self.of = of

    def scores(self, given: SelectionInput) -> torch.Tensor:
        """The deviation."""
        return given.evidence("value_deviation" if self.of == "value" else "key_deviation")


__all__ = ["DeviationSelector"]
