"""A Llama of plain PyTorch whose chunks are computed as kvblend-rag computes them, with gradients.

Two ways to read a prompt: ``full``, an ordinary prefill, and ``blended``, in which a chunk's tokens see the ingest
context and their own chunk alone, and the prompt's other tokens, the recomputed ones among them, see everything. Both
use the same weights; everything recomputed makes them equal.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.reader.batch import Batch

PROJECTIONS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


class Llama:
    """Frozen weights, and the projections' own as the caller gives them to each pass."""

    def __init__(self, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Args: the model's ``config.json``, and its tensors by their names in Hugging Face's layout."""
        self.layers = int(config["num_hidden_layers"])
        self.heads, self.kv_heads = int(config["num_attention_heads"]), int(config["num_key_value_heads"])
        self.dim = int(config["head_dim"])
        self.eps = float(config["rms_norm_eps"])
        theta = float(config["rope_parameters"]["rope_theta"])
        self.weights = weights
        device = weights["model.embed_tokens.weight"].device
        self._inverse = theta ** -(torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim)

    def full(self, projections: dict[str, Tensor], ids: Tensor, wanted: Tensor) -> Tensor:
        """Logits of an ordinary prefill.

        Args:
            projections: weights by name.
            ids: token ids, (prompts, tokens), padded behind.
            wanted: places among all of ``ids``, one row after another, whose logits are returned.
        """
        prompts, tokens = ids.shape
        turn = self._turn(torch.arange(tokens, device=ids.device).repeat(prompts))
        hidden = self._embedded(ids.flatten())
        for layer in range(self.layers):

            def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                query, key = _turned(query, turn), _turned(key, turn)
                rows = [each.view(prompts, tokens, -1, self.dim).transpose(1, 2) for each in (query, key, value)]
                return self._attention(rows, causal=True).flatten(0, 1)

            hidden = self._layer(projections, layer, hidden, attend)
        return self._logits(hidden[wanted])

    def blended(self, projections: dict[str, Tensor], batch: Batch) -> Tensor:
        """Logits at the batch's wanted places, over blended chunks."""
        context = len(batch.context)
        hidden = self._embedded(torch.cat([batch.context, batch.chunk_ids, batch.live_ids]))
        ends = [context, context + len(batch.chunk_ids)]
        own = self._turn(torch.cat([torch.arange(context, device=hidden.device), context + batch.chunk_offsets]))
        placed = self._turn(torch.cat([batch.chunk_positions, batch.live_positions]))
        live = self._turn(batch.live_positions)
        for layer in range(self.layers):

            def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                mine = _turned(query[: ends[1]], own), _turned(key[: ends[1]], own), value[: ends[1]]
                first = [each[:context].transpose(0, 1)[None] for each in mine]
                of_context = self._attention(first, causal=True)[0]
                rows = [_gathered(each[context:], batch.chunk_rows) for each in mine]
                before = [each.expand(len(batch.chunk_rows), -1, -1, -1) for each in first[1:]]
                keys, values = (torch.cat(pair, dim=2) for pair in zip(before, rows[1:], strict=True))
                of_chunks = self._attention([rows[0], keys, values], mask=batch.chunk_mask)
                asked = _gathered(_turned(query[ends[1] :], live), batch.live_rows)
                seen = _gathered(_turned(key[context:], placed), batch.seen_rows)
                held = _gathered(value[context:], batch.seen_rows)
                of_live = self._attention([asked, seen, held], mask=batch.live_mask)
                back = ((of_chunks, batch.chunk_back), (of_live, batch.live_back))
                return torch.cat([of_context, *(made.flatten(0, 1).index_select(0, places) for made, places in back)])

            hidden = self._layer(projections, layer, hidden, attend)
        return self._logits(hidden[ends[1] + batch.wanted])

    def _embedded(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weights["model.embed_tokens.weight"])

    def _layer(self, projections: dict[str, Tensor], layer: int, hidden: Tensor, attend: Any) -> Tensor:
        prefix = f"model.layers.{layer}."
        q, k, v, o, gate, up, down = (projections[f"{prefix}{name}.weight"] for name in PROJECTIONS)
        inner = self._norm(hidden, f"{prefix}input_layernorm.weight")
        query, key, value = (F.linear(inner, weight).view(len(inner), -1, self.dim) for weight in (q, k, v))
        hidden = hidden + F.linear(attend(query, key, value), o)
        inner = self._norm(hidden, f"{prefix}post_attention_layernorm.weight")
        return hidden + F.linear(F.silu(F.linear(inner, gate)) * F.linear(inner, up), down)

    def _norm(self, hidden: Tensor, name: str) -> Tensor:
        return F.rms_norm(hidden, hidden.shape[-1:], self.weights[name], self.eps)

    def _attention(self, rows: list[Tensor], mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Query, key and value, (rows, heads, tokens, dim) each; returns (rows, tokens, heads · dim)."""
        key, value = (each.repeat_interleave(self.heads // self.kv_heads, dim=1) for each in rows[1:])
        made = F.scaled_dot_product_attention(rows[0], key, value, attn_mask=mask, is_causal=causal)
        return made.transpose(1, 2).flatten(2)

    def _turn(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, None].float() * self._inverse
        angles = torch.cat([angles, angles], dim=1)[:, None]
        dtype = self.weights["model.embed_tokens.weight"].dtype
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _logits(self, hidden: Tensor) -> Tensor:
        return F.linear(self._norm(hidden, "model.norm.weight"), self.weights["model.embed_tokens.weight"]).float()


def _turned(values: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding in halves, as in transformers' Llama; values: (tokens, heads, dim)."""
    cos, sin = turn
    first, second = values.chunk(2, dim=-1)
    return values * cos + torch.cat([-second, first], dim=-1) * sin


def _gathered(values: Tensor, rows: Tensor) -> Tensor:
    """(tokens, heads, dim) as (rows, heads, tokens of a row, dim); an index's gradient would be summed by sorting."""
    return values.index_select(0, rows.flatten()).view(*rows.shape, *values.shape[1:]).transpose(1, 2)
