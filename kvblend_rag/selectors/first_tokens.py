"""The first tokens of each chunk are recomputed (EPIC's LegoLink, https://arxiv.org/abs/2410.15332)."""

from __future__ import annotations

import torch

from kvblend_rag.selectors.base import SelectionInput, Selector
from kvblend_rag.selectors.spans import offsets_in_run


class FirstTokensSelector(Selector):
    """A chunk's first tokens were computed as attention sinks, and are none in the middle of a prompt."""

    name = "first"

    def select(self, given: SelectionInput) -> torch.Tensor:
        """The first k spans of each run, k as large as the budget allows, the rest to the first runs."""
        # Counted, not sorted: of 32,000 tokens that is most of the time.
        which = offsets_in_run(given.run) // given.span
        upto = torch.bincount(which).cumsum(0)
        whole = int(torch.searchsorted(upto, given.budget, right=True))
        mask = which < whole
        left = given.budget - int(mask.sum())
        mask[(which == whole).nonzero().flatten()[:left]] = True
        return mask


__all__ = ["FirstTokensSelector"]
