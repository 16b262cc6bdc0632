"""Everything is recomputed: equal to a full prefill, which is what it is there to show."""

from __future__ import annotations

import torch

from kvblend_rag.selectors.base import SelectionInput, Selector


class EverythingSelector(Selector):
    """No stored KV is used. The one selector that takes no notice of the budget."""

    name = "everything"
    share = 1.0

    def select(self, given: SelectionInput) -> torch.Tensor:
        """All true, whatever the budget."""
        return torch.ones_like(given.positions, dtype=torch.bool)


__all__ = ["EverythingSelector"]
