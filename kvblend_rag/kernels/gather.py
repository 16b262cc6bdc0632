"""Reads tokens out of the paged caches of all layers in one launch: what an ingest does for every chunk."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvblend_rag.kernels.paged_caches import PagedCaches


@triton.jit(do_not_specialize=["tokens"])
def _kernel(
    out,
    slots,
    addresses,
    tokens,
    block_stride,
    head_stride,
    token_stride,
    block_size,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):
    token = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + token)
    head = tl.arange(0, HEADS_PADDED)[:, None]
    dim = tl.arange(0, DIM_PADDED)[None, :]
    inside = (head < HEADS) & (dim < DIM)
    # Said, since of an address out of memory the compiler can't know it, and would load piece by piece.
    cache = tl.multiple_of(tl.load(addresses + layer).to(out.dtype), 16)
    source = cache + (slot // block_size) * block_stride + (slot % block_size) * token_stride + head * head_stride + dim
    target = out + (layer * 2 * tokens + token) * HEADS * DIM + head * DIM + dim
    tl.store(target, tl.load(source, mask=inside, other=0.0), mask=inside)
    tl.store(target + tokens * HEADS * DIM, tl.load(source + DIM, mask=inside, other=0.0), mask=inside)


def gather(caches: PagedCaches, slots: torch.Tensor, out: torch.Tensor) -> None:
    """Copy some tokens' keys and values out of every layer.

    Args:
        caches: of all layers.
        slots: (tokens,) int64, on the caches' device, none of them negative.
        out: (layers, 2, tokens, kv_heads, head_dim), contiguous, of the caches' dtype and device; written.
    """
    layers, _, tokens, heads, dim = out.shape
    if not tokens:
        return
    _kernel[(tokens, layers)](
        out,
        slots,
        caches.addresses,
        tokens,
        *caches.strides,
        caches.block_size,
        HEADS=heads,
        DIM=dim,
        HEADS_PADDED=triton.next_power_of_2(heads),
        DIM_PADDED=triton.next_power_of_2(dim),
        num_warps=4,
    )


__all__ = ["gather"]
