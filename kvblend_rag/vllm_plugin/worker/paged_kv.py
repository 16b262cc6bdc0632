"""vLLM's paged KV cache as rows of tokens: block tables, slots, and reading and writing a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvblend_rag.blend.rope import Rotary
from kvblend_rag.kernels.paged_caches import PagedCaches
from kvblend_rag.vllm_plugin.worker.upload import Upload

BlockIds: TypeAlias = npt.NDArray[np.int32]
"""A request's blocks in order, (blocks,) int32, as vLLM's scheduler numbers them."""

# Digits of this base survive in every cache dtype we serve (bfloat16 holds integers up to 256).
_BASE = 64


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer that owns a KV cache."""

    name: str
    module: Any
    """vLLM's ``Attention``."""
    rotary: Rotary | None = None
    """None where the layer's keys carry no rotation, or it is not known yet."""

    @property
    def cache(self) -> torch.Tensor:
        """(blocks, kv_heads, block_size, 2 * head_dim), strides and inner order as the backend likes."""
        return self.module.kv_cache

    whole_rows: ClassVar[bool] = False
    """Whether queries meet a token's values and keys, in this order, rather than its keys alone."""

    @property
    def sees_all(self) -> bool:
        """Whether a token sees all before it, and not those in a window or chunk of its own alone."""
        return getattr(self.module, "sliding_window", None) is None and not hasattr(self.module, "attention_chunk_size")

    def write(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        """Put keys and values, each (tokens, kv_heads, head_dim), into slots, as the backend does it."""
        self.module.impl.do_kv_cache_update(self.module, keys.contiguous(), values.contiguous(), self.cache, slots)

    def meeting_keys(self, queries: torch.Tensor) -> torch.Tensor:
        """(tokens, heads, query_dim): the queries that the layer was given, as they meet its cached keys."""
        return queries


class _Half:
    """Where a block keeps its keys, or its values.

    Args:
        at: (block rows, head_dim) int64, places in a flattened block of one head.
    """

    def __init__(self, at: torch.Tensor) -> None:
        self._at, self._shape = at.flatten(), tuple(at.shape)
        run = torch.arange(len(self._at), device=at.device) + at[0, 0]
        self._together = slice(int(at[0, 0]), int(at[0, 0]) + len(self._at))
        self._in_order, self._turned = torch.equal(self._at, run), torch.equal(at.T.flatten(), run)

    def read(self, blocks: torch.Tensor, tokens: int) -> torch.Tensor:
        """(tokens, heads, head_dim), out of flattened blocks (blocks, heads, places)."""
        rows, dim = self._shape
        # vLLM keeps keys together on a CPU, turned on their side, and values in order: a view will do.
        if self._turned:
            found = blocks[:, :, self._together].unflatten(2, (dim, rows)).transpose(2, 3)
        elif self._in_order:
            found = blocks[:, :, self._together].unflatten(2, (rows, dim))
        else:
            found = blocks[:, :, self._at].unflatten(2, (rows, dim))
        return found.transpose(1, 2).flatten(0, 1)[:tokens]


class PagedKV:
    """Reads and writes tokens of a paged cache, on whichever backend.

    Writing goes through the backend's own cache write. Where it puts a token inside a block is private to
    it, so for reading that is learned once, by writing known values into a free block.

    Raises:
        ValueError: the written values don't come back in a pattern we understand.
    """

    def __init__(self, layers: Sequence[AttentionLayer], block_size: int) -> None:
        self.layers = list(layers)
        self.block_size = block_size
        cache = self.layers[0].cache
        self.heads, self._rows, self.head_dim = cache.shape[1], cache.shape[2], cache.shape[3] // 2
        self.dtype, self.device = cache.dtype, cache.device
        self.upload = Upload(self.device)
        keys_at, values_at = self._learn_layout(self.layers[0])
        self._keys, self._values = _Half(keys_at), _Half(values_at)
        row = torch.arange(self._rows, device=self.device)[:, None] * 2 * self.head_dim
        plain = row + torch.arange(self.head_dim, device=self.device)[None, :]
        token_rows = torch.equal(keys_at, plain) and torch.equal(values_at, plain + self.head_dim)
        self.caches = self._for_kernels() if token_rows and self.device.type == "cuda" else None
        """For our kernels; None where they can't be used: a token's keys and values don't lie side by side in the
        cache's last dimension, layers are laid out differently, or this is no GPU."""

    def _for_kernels(self) -> PagedCaches | None:
        try:
            return PagedCaches([layer.cache for layer in self.layers])
        except ValueError:
            return None

    def chunk_shape(self, tokens: int) -> tuple[int, int, int, int, int]:
        """Of so many tokens' KV as it is stored: (layers, 2, tokens, kv_heads, head_dim)."""
        return len(self.layers), 2, tokens, self.heads, self.head_dim

    def slots(self, block_ids: BlockIds, positions: torch.Tensor) -> torch.Tensor:
        """(tokens,) int64 slot of each position of a request, given its block ids."""
        return self.upload(self.host_slots(block_ids, positions))

    def host_slots(self, block_ids: BlockIds, positions: torch.Tensor) -> torch.Tensor:
        """``slots``, on the host."""
        # Looked up in the whole table: dividing tens of thousands of positions takes four times as long.
        blocks = torch.from_numpy(block_ids.astype(np.int64))
        slots = (blocks[:, None] * self.block_size + torch.arange(self.block_size)).flatten()
        return slots[positions]

    def write(self, layer: AttentionLayer, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        """Put keys and values, each (tokens, kv_heads, head_dim), into a layer's slots."""
        layer.write(keys, values, slots)

    def table(self, block_ids: BlockIds, tokens: int) -> torch.Tensor:
        """(blocks,) int32: the cache's blocks that hold a request's first tokens, smaller than vLLM's on some."""
        per_block = self.block_size // self._rows
        blocks = torch.from_numpy(block_ids[: -(-tokens // self.block_size)])
        kernel_blocks = (blocks[:, None] * per_block + torch.arange(per_block, dtype=torch.int32)).flatten()
        return self.upload(kernel_blocks)

    def read(self, layer: AttentionLayer, block_ids: BlockIds, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a request's first tokens, each (tokens, kv_heads, head_dim), out of a layer."""
        return self._read(layer, self.table(block_ids, tokens).long(), tokens)

    def read_chunk(self, block_ids: BlockIds, start: int, stop: int) -> torch.Tensor:
        """Some of a request's tokens out of every layer: (layers, 2, tokens, kv_heads, head_dim), contiguous."""
        if self.caches is not None:
            from kvblend_rag.kernels.gather import gather  # here, since Triton is where GPUs are

            return gather(self.caches, self.slots(block_ids, torch.arange(start, stop)))
        chunk = torch.empty(self.chunk_shape(stop - start), dtype=self.dtype, device=self.device)
        table = self.table(block_ids, stop).long()
        for layer, halves in zip(self.layers, chunk, strict=True):
            for half, tokens in zip(halves, self._read(layer, table, stop), strict=True):
                half.copy_(tokens[start:])
        return chunk

    def _read(self, layer: AttentionLayer, table: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        inside = self._flat(layer.cache[table])
        return self._keys.read(inside, tokens), self._values.read(inside, tokens)

    def read_keys(self, layer: AttentionLayer, block_ids: BlockIds, tokens: int) -> torch.Tensor:
        """What queries meet of a request's first tokens, (tokens, kv_heads, query_dim)."""
        inside = self._flat(layer.cache[self.table(block_ids, tokens).long()])
        keys = self._keys.read(inside, tokens)
        return torch.cat([self._values.read(inside, tokens), keys], dim=-1) if layer.whole_rows else keys

    def _learn_layout(self, layer: AttentionLayer) -> tuple[torch.Tensor, torch.Tensor]:
        """Where keys and values lie in a flattened block of one head, each (block rows, head_dim) int64."""
        block = 1  # block 0 is vLLM's null block
        saved = layer.cache[block].clone()
        slots = torch.arange(self._rows, device=self.device) + block * self._rows
        row = torch.arange(self._rows, device=self.device)[:, None].expand(-1, self.head_dim)
        column = torch.arange(self.head_dim, device=self.device)[None, :].expand(self._rows, -1)
        signs, found = None, []
        for digit in (row % _BASE, row // _BASE, column % _BASE, column // _BASE):
            values = (digit + 1).to(self.dtype)[:, None, :].expand(-1, self.heads, -1)
            layer.write(values, -values, slots)
            inside = self._flat(layer.cache[block : block + 1])[0]
            if not bool((inside == inside[0]).all()):
                raise ValueError("the heads of a block are laid out differently from one another")
            found.append(inside[0].float().round().to(torch.int64))
            signs = found[-1].sign()
        layer.cache[block].copy_(saved)
        assert signs is not None
        low_row, high_row, low_column, high_column = (values.abs() - 1 for values in found)
        token, dim = low_row + _BASE * high_row, low_column + _BASE * high_column
        maps = []
        for sign in (1, -1):
            here = (signs == sign).nonzero().flatten()
            target = token[here] * self.head_dim + dim[here]
            wanted = torch.arange(self._rows * self.head_dim, device=self.device)
            if len(here) != len(wanted) or not torch.equal(target.sort().values, wanted):
                raise ValueError("written keys and values don't come back in a pattern we understand")
            maps.append(here[target.argsort()].view(self._rows, self.head_dim))
        return maps[0], maps[1]

    @staticmethod
    def _flat(blocks: torch.Tensor) -> torch.Tensor:
        return blocks.reshape(blocks.shape[0], blocks.shape[1], -1)


__all__ = ["AttentionLayer", "BlockIds", "PagedKV"]
