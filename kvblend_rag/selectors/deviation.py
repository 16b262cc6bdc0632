"""Tokens whose KV changes most in context are recomputed (CacheBlend, https://arxiv.org/abs/2405.16444)."""

from __future__ import annotations

from typing import Literal

import torch

from kvblend_rag.selectors.base import Evidence, SelectionInput, Selector
from kvblend_rag.selectors.spans import choose_spans


class DeviationSelector(Selector):
    """The deviation in a first layer tells which tokens attend to other chunks.

    The paper picks single tokens (``span`` 1) and narrows its choice from layer to layer; this is its
    choice at the layer the worker measured.
    """

    name = "deviation"
    needs = frozenset({Evidence.DEVIATION})

    def __init__(self, of: Literal["value", "key"] = "value") -> None:
        """Args: whether values (as in the paper's code) or keys are compared."""
        self.of = of

    def select(self, given: SelectionInput) -> torch.Tensor:
        """The spans of highest deviation."""
        scores = given.evidence("value_deviation" if self.of == "value" else "key_deviation")
        return choose_spans(scores, given.run, given.budget, given.span)


__all__ = ["DeviationSelector"]
