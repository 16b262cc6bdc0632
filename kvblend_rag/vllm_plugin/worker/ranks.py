"""Ranks: what the tensor-parallel workers must agree on before they launch the same forward."""

from __future__ import annotations

import torch
from vllm.distributed import get_tp_group


class Ranks:
    """The tensor-parallel group; with one rank every call returns its argument."""

    def __init__(self) -> None:
        self._group = get_tp_group()

    @property
    def rank(self) -> int:
        """This worker's place in the group."""
        return int(self._group.rank_in_group)

    @property
    def size(self) -> int:
        """Workers in the group."""
        return int(self._group.world_size)

    def all_agree(self, fine: bool) -> bool:
        """Whether it is true on every rank: if one can't load its heads, none blends."""
        return bool(self.least(int(fine)))

    def least(self, number: int) -> int:
        """The least of the ranks' numbers: what each found out by its own clock is another on each."""
        if self.size == 1:
            return number
        least = torch.tensor(number)
        torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN, group=self._group.cpu_group)
        return int(least)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, float32; each sees its own heads only."""
        return values if self.size == 1 else self._group.all_reduce(values)

    def same(self, mask: torch.Tensor) -> torch.Tensor:
        """Rank 0's mask, on every rank: a tie broken differently would hang the next all-reduce."""
        return mask if self.size == 1 else self._group.broadcast(mask.to(torch.uint8), src=0).bool()


__all__ = ["Ranks"]
