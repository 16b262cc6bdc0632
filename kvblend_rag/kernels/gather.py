"""One pass over the paged caches: a request's keys and values, of all layers, as a chunk is stored.

The bytes moved are the floor: each element is read once and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvblend_rag.kernels.paged_caches import PagedCaches

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""By bytes of an element: nothing is computed, and not every GPU's compiler knows every small float."""

_TOKENS = 4
"""Of a program: a single token's keys are a few KiB, too few to hide what it costs to find them."""


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["slots"])
def _kernel(
    gathered,
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
    TOKENS: tl.constexpr,
):
    layer = tl.program_id(1).to(tl.int64)
    head = tl.arange(0, HEADS_PADDED)[:, None]
    dim = tl.arange(0, DIM_PADDED)[None, :]
    inside = (head < HEADS) & (dim < DIM)
    # Said, since of an address out of memory the compiler can't know it, and would load piece by piece.
    cache = tl.multiple_of(tl.load(addresses + layer).to(gathered.dtype), 16)
    for index in range(TOKENS):
        token = tl.program_id(0) * TOKENS + index
        if token < tokens:
            slot = tl.load(slots + token)
            source = cache + (slot // block_size) * block_stride + (slot % block_size) * token_stride
            key = tl.load(source + head * head_stride + dim, mask=inside, other=0)
            value = tl.load(source + head * head_stride + DIM + dim, mask=inside, other=0)
            target = gathered + (2 * layer * tokens + token) * HEADS * DIM + head * DIM + dim
            tl.store(target, key, mask=inside)
            tl.store(target + tokens.to(tl.int64) * HEADS * DIM, value, mask=inside)


def gather(caches: PagedCaches, slots: torch.Tensor) -> torch.Tensor:
    """Keys and values of some slots out of every layer's cache.

    Args:
        caches: of all layers.
        slots: (tokens,) int64, on the caches' device.

    Returns:
        (layers, 2, tokens, kv_heads, head_dim), keys first, contiguous.
    """
    layers, tokens = len(caches.addresses), len(slots)
    gathered = torch.empty(layers, 2, tokens, caches.heads, caches.dim, dtype=caches.dtype, device=slots.device)
    if gathered.numel():
        _kernel[(triton.cdiv(tokens, _TOKENS), layers)](
            gathered.view(_WORDS[gathered.itemsize]),
            slots,
            caches.addresses,
            tokens,
            *caches.strides,
            caches.block_size,
            HEADS=caches.heads,
            DIM=caches.dim,
            HEADS_PADDED=triton.next_power_of_2(caches.heads),
            DIM_PADDED=triton.next_power_of_2(caches.dim),
            TOKENS=_TOKENS,
            num_warps=4,
        )
    return gathered


__all__ = ["gather"]
