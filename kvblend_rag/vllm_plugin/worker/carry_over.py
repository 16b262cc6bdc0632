"""CarryOver: while a forward recomputes some of the reused tokens, moves the others' KV in the paged cache along."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from kvblend_rag.blend.carry import carried
from kvblend_rag.blend.rope import Rotary, rotate, shift
from kvblend_rag.vllm_plugin.metadata import BlendJob
from kvblend_rag.vllm_plugin.worker.loader import Turn, turning
from kvblend_rag.vllm_plugin.worker.paged_kv import AttentionLayer, PagedKV


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
        self._layers = {layer.name: layer for layer in paged.layers}
        positions, run = job.plan.reused_positions()
        exact = np.array([each.exact for each in job.plan.runs])[run]
        again = np.zeros(job.plan.prompt_tokens, bool)
        for start, stop in recomputed:
            again[start:stop] = True
        again = again[positions]
        self._shown, self._shown_run = positions[again], run[again]
        self._others, self._others_run = positions[~again & ~exact], run[~again & ~exact]
        self._turns: dict[tuple[int, bool] | None, tuple[Turn | None, Turn | None]] = {}
        self._from: torch.Tensor | None = None

    def begin(self, positions: npt.NDArray[np.int64]) -> None:
        """Prepare for a forward over these positions, (tokens,) in the order in which they go through the model."""
        upload = self._paged.upload
        in_order = np.argsort(positions)
        at = np.searchsorted(positions, self._shown, sorter=in_order).clip(max=len(positions) - 1)
        here = positions[in_order[at]] == self._shown
        shown = self._shown[here]
        reach = shown[-1] if len(shown) and shown[-1] != self._shown[-1] else self._job.plan.prompt_tokens
        near = self._others < reach
        others = self._others[near]
        self._from = None
        if len(shown) and len(others):
            self._from = upload(torch.from_numpy(in_order[at[here]]))
            self._at, self._of = upload(torch.from_numpy(shown)), upload(torch.from_numpy(self._shown_run[here]))
            self._to, self._to_run = upload(torch.from_numpy(others)), upload(torch.from_numpy(self._others_run[near]))
            self._slots = self._paged.slots(self._job.block_ids, torch.from_numpy(others))
            self._turns.clear()
        if len(shown):
            self._others, self._others_run = self._others[~near], self._others_run[~near]

    def move(self, layer_name: str, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Move the other tokens' KV of one layer.

        Args:
            layer_name: whose stored KV has arrived, and whose new KV is not written yet.
            keys: (tokens, kv_heads, head_dim), the new keys of the forward's tokens, rotated.
            values: the same, of their values.
        """
        if self._from is None:
            return
        layer, job = self._layers[layer_name], self._job
        back, forth = self._rotations(layer)
        stored_keys, stored_values = self._paged.read(layer, job.block_ids, job.plan.prompt_tokens)
        key_changes = keys[self._from].float() - stored_keys[self._at].float()
        value_changes = values[self._from].float() - stored_values[self._at].float()
        changes = torch.cat([_turned(key_changes, back, layer.rotary), value_changes], dim=1)
        moves = job.recipe.carry * carried(changes, self._of, len(job.plan.runs))[self._to_run]
        key_moves, value_moves = moves.chunk(2, dim=1)
        moved_keys = stored_keys[self._to].float() + _turned(key_moves, forth, layer.rotary)
        moved_values = stored_values[self._to].float() + value_moves
        self._paged.write(layer, moved_keys.to(keys.dtype), moved_values.to(values.dtype), self._slots)

    def _rotations(self, layer: AttentionLayer) -> tuple[Turn | None, Turn | None]:
        """From where the recomputed tokens stand to position 0, and from there to where the others stand."""
        which = turning(layer.rotary)
        if which not in self._turns:
            if layer.rotary is None or which is None:
                self._turns[which] = None, None
            else:
                first = torch.zeros_like(self._at), torch.zeros_like(self._to)
                self._turns[which] = shift(layer.rotary, self._at, first[0]), shift(layer.rotary, first[1], self._to)
        return self._turns[which]


def _turned(keys: torch.Tensor, turn: Turn | None, rotary: Rotary | None) -> torch.Tensor:
    return keys if turn is None or rotary is None else rotate(keys, *turn, rotary.interleaved)


__all__ = ["CarryOver"]
