"""Rotary tables, read out of the loaded model's own rotary modules.

Nothing is computed from a formula of ours: a table's rows are what the model multiplies its keys with. What
can't be known from a module, whether a layer applies it (Cohere2, EXAONE 4 and SmolLM3 don't everywhere) and
which dimensions make a pair in Transformers' own code, is left open; the survey measures it.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from kvblend_rag.blend.rope import Rotary
from kvblend_rag.vllm_plugin.worker.latent import dims_in_front

# Relative; a table in bfloat16 is this coarse.
_COARSE = 0.02


class NoShift(Exception):
    """The rotary embedding can't be moved to another position; the message is the reason."""


class Rotations:
    """What each layer of a model may do with its keys.

    Args:
        model: as vLLM loaded it.
        positions: how many it may be asked for.
    """

    def __init__(self, model: Any, positions: int) -> None:
        self._model, self._positions = model, positions
        # Layers share tables, which are large; Turns tells them apart by address.
        self._known: dict[tuple[int, Any], Rotary] = {}

    def of(self, layer_name: str) -> list[Rotary | None]:
        """A layer's possible rotations; None stands for keys that are not turned.

        Args:
            layer_name: of an attention layer, as vLLM's forward context names it.

        Raises:
            NoShift: its rotary embedding is of a kind whose keys can't be moved.
        """
        try:
            parent = self._model.get_submodule(layer_name.rpartition(".")[0])
        except AttributeError:
            parent = torch.nn.Module()
        found = [self._behind(child, _dims_in_front(parent)) for child in parent.children() if _is_rotary(child)]
        shared = getattr(getattr(self._model, "model", None), "rotary_emb", None)
        if not found and shared is not None and not _is_rotary(shared):
            found = self._from_transformers(shared, layer_name)
        return [*found, None]

    def _behind(self, module: Any, dims: int) -> Rotary:
        if (id(module), dims) not in self._known:
            table = table_of(module)
            try:
                self._known[id(module), dims] = table.behind(dims) if dims else table
            except ValueError as error:
                raise NoShift(f"its rotary embedding turns the last dimensions of a head, and {error}") from error
        return self._known[id(module), dims]

    def _from_transformers(self, module: Any, layer_name: str) -> list[Rotary]:
        """The two rotations that a module of Transformers' own code may stand for; none for a layer it leaves out."""
        rope_type, which = getattr(module, "rope_type", "default"), None
        if isinstance(rope_type, dict):  # one set of frequencies a kind of layer
            number = re.search(r"\d+", layer_name)
            assert number is not None
            which = self._model.text_config.layer_types[int(number[0])]
            if which not in rope_type:
                return []
            rope_type = rope_type[which]
        if "dynamic" in rope_type or rope_type == "longrope":
            raise NoShift(
                f"its rotary embedding, {type(module).__name__} of Transformers, changes its frequencies with the "
                f"prompt's length ({rope_type})"
            )
        if (id(module), which) not in self._known:
            self._known[id(module), which] = Rotary(self._computed(module, which), interleaved=False)
        table = self._known[id(module), which].table
        return [Rotary(table, interleaved=False), Rotary(table, interleaved=True)]

    def _computed(self, module: Any, which: str | None) -> torch.Tensor:
        """(positions, rotary_dim), as ``Rotary.table``."""
        kind = type(module).__name__
        device = next(self._model.parameters()).device
        like = torch.empty(1, 1, dtype=self._model.model_config.dtype, device=device)
        places = torch.arange(self._positions, device=device)[None]
        with torch.inference_mode():
            found = module(like, places, *([] if which is None else [which]))
        if not isinstance(found, tuple) or found[0].ndim != 3:
            raise NoShift(f"its rotary embedding, {kind} of Transformers, gives no cosines and sines")
        cos, sin = (each[0] for each in found)
        half = cos.shape[1] // 2
        for first, second in ((slice(half), slice(half, None)), (slice(0, None, 2), slice(1, None, 2))):
            if all(torch.equal(each[:, first], each[:, second]) for each in (cos, sin)):
                return torch.cat([cos[:, first], sin[:, first]], dim=1)
        raise NoShift(f"its rotary embedding, {kind} of Transformers, turns a pair's dimensions by different angles")


def table_of(module: Any) -> Rotary:
    """The table of one of vLLM's rotary modules (vllm/model_executor/layers/rotary_embedding).

    Raises:
        NoShift: it has none whose rows are cosines and sines of one angle a pair.
    """
    kind = type(module).__name__
    interleaved = not getattr(module, "is_neox_style", True)
    table = getattr(module, "cos_sin_cache", None)
    long_short = getattr(module, "long_short_cos_sin_cache", None)
    if long_short is not None:  # LongRoPE keeps both tables in one and picks one for good by max_model_len
        table = long_short[module.original_max_position_embeddings if module.use_long_rope else 0 :]
    if table is None or table.is_complex() or table.ndim != 2 or table.shape[1] != module.rotary_dim:
        raise NoShift(f"its rotary embedding, {kind}, is no rotation by one angle a pair and position")
    cos, sin = table.float().chunk(2, dim=-1)
    norm = cos.square() + sin.square()
    if not bool((norm / norm[0, 0] - 1).abs().max() < _COARSE):
        raise NoShift(f"its rotary embedding, {kind}, makes keys larger or smaller from position to position")
    return Rotary(table, interleaved)


def _is_rotary(module: torch.nn.Module) -> bool:
    """One of vLLM's own: each of them keeps tables, and knows how many dimensions they turn."""
    return hasattr(module, "rotary_dim") and hasattr(module, "head_size")


def _dims_in_front(attention: Any) -> int:
    """Dimensions of a cached key before those that are turned, which only DeepSeek's attention has."""
    if not hasattr(attention, "qk_rope_head_dim"):
        return 0
    if hasattr(attention, "mla_attn"):
        return dims_in_front(attention.kv_lora_rank, attention.qk_rope_head_dim)
    return int(attention.qk_nope_head_dim)


__all__ = ["NoShift", "Rotations", "table_of"]
