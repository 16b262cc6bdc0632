"""Nothing is recomputed: the fastest, and the base that all others are measured against."""

from __future__ import annotations

import torch

from kvblend_rag.selectors.base import SelectionInput, Selector


class NothingSelector(Selector):
    """Every reused token keeps its stored KV."""

    name = "none"
    share = 0.0

    def select(self, given: SelectionInput) -> torch.Tensor:
        """All false, whatever the budget."""
        return torch.zeros_like(given.positions, dtype=torch.bool)


__all__ = ["NothingSelector"]
