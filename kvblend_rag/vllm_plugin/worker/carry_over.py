"""CarryOver: while a forward recomputes some of the reused tokens, moves the others' KV in the paged cache along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from kvblend_rag.blend.carry import carried
from kvblend_rag.blend.rope import Rotary, rotate, shift
from kvblend_rag.kernels.paged_caches import PagedCaches
from kvblend_rag.vllm_plugin.metadata import BlendJob
from kvblend_rag.vllm_plugin.worker.loader import Turn, turning
from kvblend_rag.vllm_plugin.worker.paged_kv import PagedKV

_Where = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""Of some reused tokens: prompt position and index of the run."""


@dataclass(frozen=True)
class _Part:
    """What one forward shows and moves; tensors are int64, on the device."""

    among: torch.Tensor
    """(recomputed tokens,), which of the forward's tokens they are."""
    shown: torch.Tensor
    """(recomputed tokens,), their positions."""
    shown_run: torch.Tensor
    shown_slots: torch.Tensor
    """(recomputed tokens,), in the paged cache."""
    others: torch.Tensor
    """(other tokens,), positions."""
    others_run: torch.Tensor
    slots: torch.Tensor
    """(other tokens,), in the paged cache."""
    turns: dict[tuple[int, bool], tuple[Turn, Turn]] = field(default_factory=dict)

    def rotations(self, rotary: Rotary | None) -> tuple[Turn | None, Turn | None]:
        """From where the recomputed tokens stand to position 0, and from there to where the others stand."""
        which = turning(rotary)
        if rotary is None or which is None:
            return None, None
        if which not in self.turns:
            back = shift(rotary, self.shown, torch.zeros_like(self.shown))
            self.turns[which] = back, shift(rotary, torch.zeros_like(self.others), self.others)
        return self.turns[which]


class CarryOver:
    """Of one request; see ``blend/carry.py``.

    Each token that is left as stored is moved once in each layer: by the forward that recomputes tokens around it,
    before that forward's queries meet it. Tokens whose KV is a full prefill's stay as they are.

    Args:
        job: the request, its KV loaded or on its way.
        recomputed: prompt ranges ``[start, stop)`` of reused tokens that are computed again.
        paged: the cache.
    """

    def __init__(self, job: BlendJob, recomputed: Sequence[tuple[int, int]], paged: PagedKV) -> None:
        self._job, self._paged = job, paged
        self._layers = {layer.name: (index, layer) for index, layer in enumerate(paged.layers)}
        positions, run = job.plan.reused_positions()
        exact = np.array([each.exact for each in job.plan.runs])[run]
        again = np.zeros(job.plan.prompt_tokens, bool)
        for start, stop in recomputed:
            again[start:stop] = True
        again = again[positions]
        self._shown: _Where = positions[again], run[again]
        self._others: _Where = positions[~again & ~exact], run[~again & ~exact]
        self._part: _Part | None = None

    def begin(self, positions: npt.NDArray[np.int64]) -> None:
        """Prepare for a forward over these positions, (tokens,) in the order in which they go through the model."""
        self._part = None
        in_order = np.argsort(positions)
        all_shown, run = self._shown
        at = np.searchsorted(positions, all_shown, sorter=in_order).clip(max=len(positions) - 1)
        here = positions[in_order[at]] == all_shown
        if not here.any():
            return
        shown = all_shown[here]
        # Those behind the last one shown wait for the next forward, if that shows any.
        reach = self._job.plan.prompt_tokens if shown[-1] == all_shown[-1] else shown[-1]
        others, others_run = self._others
        near = others < reach
        self._others = others[~near], others_run[~near]
        if near.any():
            self._part = _Part(
                among=self._upload(in_order[at[here]]),
                shown=self._upload(shown),
                shown_run=self._upload(run[here]),
                shown_slots=self._slots(shown),
                others=self._upload(others[near]),
                others_run=self._upload(others_run[near]),
                slots=self._slots(others[near]),
            )

    def move(self, layer_name: str, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Move the other tokens' KV of one layer.

        Args:
            layer_name: whose stored KV has arrived, and whose new KV is not written yet.
            keys: (tokens, kv_heads, head_dim), the new keys of the forward's tokens, rotated.
            values: the same, of their values.
        """
        part = self._part
        if part is None:
            return
        index, layer = self._layers[layer_name]
        if self._paged.caches is not None and keys.dtype == self._paged.caches.dtype:
            self._move_by_kernels(part, index, self._paged.caches, keys, values)
            return
        job = self._job
        back, forth = part.rotations(layer.rotary)
        stored_keys, stored_values = self._paged.read(layer, job.block_ids, job.plan.prompt_tokens)
        key_changes = keys[part.among].float() - stored_keys[part.shown].float()
        value_changes = values[part.among].float() - stored_values[part.shown].float()
        changes = torch.cat([_turned(key_changes, back, layer.rotary), value_changes], dim=1)
        key_moves, value_moves = self._moves(part, changes)[part.others_run].chunk(2, dim=1)
        moved_keys = stored_keys[part.others].float() + _turned(key_moves, forth, layer.rotary)
        moved_values = stored_values[part.others].float() + value_moves
        self._paged.write(layer, moved_keys.to(keys.dtype), moved_values.to(values.dtype), part.slots)

    def _move_by_kernels(
        self, part: _Part, index: int, caches: PagedCaches, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """The same, passing once over what changed and once over what is moved."""
        from kvblend_rag.kernels import carry as kernels  # here, since Triton is where GPUs are

        rotary = self._paged.layers[index].rotary
        back, forth = part.rotations(rotary)
        where = (rotary is not None and rotary.interleaved, caches, index)
        changes = kernels.changes(keys, values, part.among, part.shown_slots, back, *where)
        kernels.move(self._moves(part, changes), part.others_run, part.slots, forth, *where)

    def _moves(self, part: _Part, changes: torch.Tensor) -> torch.Tensor:
        """(runs, 2 * kv_heads, head_dim) float32, by which each run's other tokens are moved."""
        return self._job.recipe.carry * carried(changes, part.shown_run, len(self._job.plan.runs))

    def _slots(self, positions: npt.NDArray[np.int64]) -> torch.Tensor:
        return self._paged.slots(self._job.block_ids, torch.from_numpy(positions))

    def _upload(self, indices: npt.NDArray[np.int64]) -> torch.Tensor:
        return self._paged.upload(torch.from_numpy(indices))


def _turned(keys: torch.Tensor, turn: Turn | None, rotary: Rotary | None) -> torch.Tensor:
    return keys if turn is None or rotary is None else rotate(keys, *turn, rotary.interleaved)


__all__ = ["CarryOver"]
