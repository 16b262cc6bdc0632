"""One pass over staged KV: read a token's keys and values, rotate the keys, write both into the paged caches.

Several layers go in one launch. The bytes moved are the floor: each element is read once and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvblend_rag.kernels.paged_caches import PagedCaches
from kvblend_rag.kernels.pairs import pairs


# Nor by where a table of single numbers begins: a row of it may begin anywhere, and each way would be compiled.
@triton.jit(
    do_not_specialize=["first", "passed"],
    do_not_specialize_on_alignment=["keys_at", "values_at", "steps", "slots"],
)
def _kernel(
    staged,
    keys_at,
    values_at,
    steps,
    slots,
    cos,
    sin,
    addresses,
    first,
    passed,
    block_stride,
    head_stride,
    token_stride,
    block_size,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):
    token = tl.program_id(0)
    layer = tl.program_id(1)
    slot = tl.load(slots + token)
    if slot >= 0:
        head = tl.arange(0, HEADS_PADDED)[:, None]
        dim = tl.arange(0, DIM_PADDED)[None, :]
        inside = (head < HEADS) & (dim < DIM)
        rotated = dim < 2 * HALF
        partner, sign, frequency = pairs(dim, HALF, INTERLEAVED)
        behind = tl.load(steps + token) * (passed + layer)
        source = staged + tl.load(keys_at + token) + behind
        key = tl.load(source + head * DIM + dim, mask=inside, other=0.0)
        if HALF > 0:
            other = tl.load(source + head * DIM + partner, mask=inside & rotated, other=0.0).to(tl.float32)
            c = tl.load(cos + token * HALF + frequency, mask=rotated, other=1.0)
            s = tl.load(sin + token * HALF + frequency, mask=rotated, other=0.0)
            turned = (key.to(tl.float32) * c + sign * other * s).to(key.dtype)
            key = tl.where(rotated, turned, key)
        value = tl.load(staged + tl.load(values_at + token) + behind + head * DIM + dim, mask=inside, other=0.0)
        # Said, since of an address out of memory the compiler can't know it, and would store piece by piece.
        cache = tl.multiple_of(tl.load(addresses + first + layer).to(staged.dtype), 16)
        target = cache + (slot // block_size) * block_stride + (slot % block_size) * token_stride
        tl.store(target + head * head_stride + dim, key, mask=inside)
        tl.store(target + head * head_stride + DIM + dim, value, mask=inside)


def rotate_scatter(
    staged: torch.Tensor,
    keys_at: torch.Tensor,
    values_at: torch.Tensor,
    steps: torch.Tensor,
    slots: torch.Tensor,
    turn: tuple[torch.Tensor, torch.Tensor] | None,
    interleaved: bool,
    caches: PagedCaches,
    layers: range,
    placed_at: int,
) -> None:
    """Write staged tokens into the paged caches of some neighbouring layers.

    Args:
        staged: any contiguous tensor of the caches' dtype; a token's keys are (kv_heads, head_dim) in it.
        keys_at: (tokens,) int64, element offset of each token's keys at layer ``placed_at``.
        values_at: (tokens,) int64, of its values.
        steps: (tokens,) int64, elements from a token's keys at one layer to those at the next.
        slots: (tokens,) int64; a token at −1 is passed over.
        turn: cosines and sines from ``blend.rope.shift``, each (tokens, rotary_dim / 2) float32; None: as stored.
        interleaved: pairs are neighbours (GPT-J) rather than halves (NeoX).
        caches: of all layers.
        layers: which of them are written.
        placed_at: the layer whose places ``keys_at`` and ``values_at`` hold, at most the first that is written.
    """
    tokens = len(slots)
    if not tokens or not layers:
        return
    half = 0 if turn is None else turn[0].shape[1]
    cos, sin = turn if turn is not None else (staged, staged)
    _kernel[(tokens, len(layers))](
        staged,
        keys_at,
        values_at,
        steps,
        slots,
        cos,
        sin,
        caches.addresses,
        layers.start,
        layers.start - placed_at,
        *caches.strides,
        caches.block_size,
        HEADS=caches.heads,
        DIM=caches.dim,
        HALF=half,
        INTERLEAVED=interleaved,
        HEADS_PADDED=triton.next_power_of_2(caches.heads),
        DIM_PADDED=triton.next_power_of_2(caches.dim),
        num_warps=4,
    )


__all__ = ["rotate_scatter"]
