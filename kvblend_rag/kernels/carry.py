"""Carrying over on a GPU: what recomputing changed in some tokens, and moving others by it, in the paged cache.

Two passes for a layer; what they are made into between them (``blend/carry.py``) is small. The second reads and writes
each moved element once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kvblend_rag.kernels.paged_caches import PagedCaches
from kvblend_rag.kernels.pairs import pairs


@triton.jit
def _row(
    addresses, layer, slot, head, block_stride, head_stride, token_stride, block_size, DTYPE: tl.constexpr
):  # fmt: skip
    """Where a slot's keys begin in a layer's cache, by head."""
    # Said, since of an address out of memory the compiler can't know it, and would go piece by piece.
    cache = tl.multiple_of(tl.load(addresses + layer).to(tl.pointer_type(DTYPE)), 16)
    return cache + (slot // block_size) * block_stride + (slot % block_size) * token_stride + head * head_stride


@triton.jit
def _turned(key, other, cos, sin, index, dim, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """A token's keys, turned, given the other half of each pair."""
    rotated = dim < 2 * HALF
    _partner, sign, frequency = pairs(dim, HALF, INTERLEAVED)
    c = tl.load(cos + index * HALF + frequency, mask=rotated, other=1.0)
    s = tl.load(sin + index * HALF + frequency, mask=rotated, other=0.0)
    return tl.where(rotated, key * c + sign * other * s, key)


@triton.jit(do_not_specialize=["layer"], do_not_specialize_on_alignment=["among", "slots"])
def _changes(
    keys,
    values,
    among,
    slots,
    cos,
    sin,
    changes,
    addresses,
    layer,
    key_token,
    key_head,
    value_token,
    value_head,
    block_stride,
    head_stride,
    token_stride,
    block_size,
    DTYPE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    token, slot = tl.load(among + index), tl.load(slots + index)
    head = tl.arange(0, HEADS_PADDED)[:, None]
    dim = tl.arange(0, DIM_PADDED)[None, :]
    inside = (head < HEADS) & (dim < DIM)
    stored = _row(addresses, layer, slot, head, block_stride, head_stride, token_stride, block_size, DTYPE)
    new = keys + token * key_token + head * key_head
    key = tl.load(new + dim, mask=inside, other=0.0).to(tl.float32)
    key -= tl.load(stored + dim, mask=inside, other=0.0).to(tl.float32)
    if HALF > 0:
        partner, _sign, _frequency = pairs(dim, HALF, INTERLEAVED)
        paired = inside & (dim < 2 * HALF)
        other = tl.load(new + partner, mask=paired, other=0.0).to(tl.float32)
        other -= tl.load(stored + partner, mask=paired, other=0.0).to(tl.float32)
        key = _turned(key, other, cos, sin, index, dim, HALF, INTERLEAVED)
    value = tl.load(values + token * value_token + head * value_head + dim, mask=inside, other=0.0).to(tl.float32)
    value -= tl.load(stored + DIM + dim, mask=inside, other=0.0).to(tl.float32)
    target = changes + index * 2 * HEADS * DIM + head * DIM + dim
    tl.store(target, key, mask=inside)
    tl.store(target + HEADS * DIM, value, mask=inside)


@triton.jit(do_not_specialize=["layer"], do_not_specialize_on_alignment=["runs", "slots"])
def _move(
    moves,
    runs,
    slots,
    cos,
    sin,
    addresses,
    layer,
    block_stride,
    head_stride,
    token_stride,
    block_size,
    DTYPE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + index)
    head = tl.arange(0, HEADS_PADDED)[:, None]
    dim = tl.arange(0, DIM_PADDED)[None, :]
    inside = (head < HEADS) & (dim < DIM)
    move = moves + tl.load(runs + index) * 2 * HEADS * DIM + head * DIM
    key = tl.load(move + dim, mask=inside, other=0.0)
    if HALF > 0:
        partner, _sign, _frequency = pairs(dim, HALF, INTERLEAVED)
        other = tl.load(move + partner, mask=inside & (dim < 2 * HALF), other=0.0)
        key = _turned(key, other, cos, sin, index, dim, HALF, INTERLEAVED)
    value = tl.load(move + HEADS * DIM + dim, mask=inside, other=0.0)
    place = _row(addresses, layer, slot, head, block_stride, head_stride, token_stride, block_size, DTYPE) + dim
    key += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(place + DIM, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, key.to(DTYPE), mask=inside)
    tl.store(place + DIM, value.to(DTYPE), mask=inside)


def changes(
    keys: torch.Tensor,
    values: torch.Tensor,
    among: torch.Tensor,
    slots: torch.Tensor,
    turn: tuple[torch.Tensor, torch.Tensor] | None,
    interleaved: bool,
    caches: PagedCaches,
    layer: int,
) -> torch.Tensor:
    """What new KV of some tokens differs by from that in a layer's cache: (tokens, 2 * kv_heads, head_dim) float32,
    keys, turned, in front of values.

    Args:
        keys: (any, kv_heads, head_dim), of the caches' dtype, the last dimension contiguous.
        values: the same.
        among: (tokens,) int64, which of them.
        slots: (tokens,) int64, where those lie in the cache.
        turn: cosines and sines from ``blend.rope.shift``, each (tokens, rotary_dim / 2) float32; None: not turned.
        interleaved: pairs are neighbours (GPT-J) rather than halves (NeoX).
        caches: of all layers.
        layer: index of this one.
    """
    found = torch.empty(len(among), 2 * caches.heads, caches.dim, dtype=torch.float32, device=keys.device)
    cos, sin = turn if turn is not None else (found, found)
    _changes[(len(among),)](
        keys,
        values,
        among,
        slots,
        cos,
        sin,
        found,
        caches.addresses,
        layer,
        *keys.stride()[:2],
        *values.stride()[:2],
        *caches.strides,
        caches.block_size,
        **_shape(caches, turn, interleaved),
    )
    return found


def move(
    moves: torch.Tensor,
    runs: torch.Tensor,
    slots: torch.Tensor,
    turn: tuple[torch.Tensor, torch.Tensor] | None,
    interleaved: bool,
    caches: PagedCaches,
    layer: int,
) -> None:
    """Add to tokens' KV in a layer's cache.

    Args:
        moves: (runs, 2 * kv_heads, head_dim) float32, contiguous, of keys, which are turned first, and of values.
        runs: (tokens,) int64, which of them is a token's.
        slots: (tokens,) int64, each once.
        turn: as of ``changes``.
        interleaved: as of ``changes``.
        caches: of all layers.
        layer: index of this one.
    """
    cos, sin = turn if turn is not None else (moves, moves)
    _move[(len(runs),)](
        moves,
        runs,
        slots,
        cos,
        sin,
        caches.addresses,
        layer,
        *caches.strides,
        caches.block_size,
        **_shape(caches, turn, interleaved),
    )


def _shape(caches: PagedCaches, turn: tuple[torch.Tensor, torch.Tensor] | None, interleaved: bool) -> dict[str, Any]:
    return {
        "DTYPE": getattr(tl, str(caches.dtype).removeprefix("torch.")),
        "HEADS": caches.heads,
        "DIM": caches.dim,
        "HALF": 0 if turn is None else turn[0].shape[1],
        "INTERLEAVED": interleaved,
        "HEADS_PADDED": triton.next_power_of_2(caches.heads),
        "DIM_PADDED": triton.next_power_of_2(caches.dim),
        "num_warps": 4,
    }


__all__ = ["changes", "move"]
