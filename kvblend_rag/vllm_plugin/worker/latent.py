"""LatentLayer: multi-head latent attention (MLA) as a layer with keys and values.

DeepSeek V2 and V3 and Kimi cache, for all heads together, a latent without position and a few dimensions that
are turned, ``[latent | turned]``, 512 and 64 (arXiv 2405.04434). Stored as they are, in two halves of the row:
the second half, which the turned dimensions end, goes by the name of keys, and the first by that of values. So a
chunk takes no byte more than its cache, and stores and loaders need not know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvblend_rag.vllm_plugin.worker.paged_kv import AttentionLayer


def dims_in_front(latent: int, turned: int) -> int:
    """Dimensions of a row's second half in front of those that are turned."""
    return (latent - turned) // 2


@dataclass(frozen=True)
class LatentLayer(AttentionLayer):
    """A layer of vLLM's ``MLAAttention``, whose cache is (blocks, block_size, latent + turned)."""

    whole_rows: ClassVar[bool] = True

    @property
    def cache(self) -> torch.Tensor:
        """(blocks, 1, block_size, latent + turned)."""
        return self.module.kv_cache.unsqueeze(1)

    def write(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        """See ``AttentionLayer.write``."""
        layer = self.module
        rows = torch.cat([values, keys], dim=-1)
        latent, turned = rows.split([layer.kv_lora_rank, layer.qk_rope_head_dim], dim=-1)
        layer.impl.do_kv_cache_update(
            latent.squeeze(1).contiguous(),
            turned.contiguous(),
            layer.kv_cache,
            slots,
            layer.kv_cache_dtype,
            layer._k_scale,
        )

    def meeting_keys(self, queries: torch.Tensor) -> torch.Tensor:
        """(tokens, heads, latent + turned): their part without position taken into the latent's space."""
        layer = self.module
        still, turned = queries.split([layer.qk_nope_head_dim, layer.qk_rope_head_dim], dim=-1)
        return torch.cat([torch.einsum("thp,hpl->thl", still, layer.W_UK_T), turned], dim=-1)


__all__ = ["LatentLayer", "dims_in_front"]
