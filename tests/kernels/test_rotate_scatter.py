"""The fused kernel, in Triton's interpreter, against the plain path it stands in for."""

import pytest

CHECK = """
import torch
from kvblend_rag.blend.rope import Rotary, rotate, shift
from kvblend_rag.kernels.paged_caches import PagedCaches
from kvblend_rag.kernels.rotate_scatter import rotate_scatter


def check(heads, dim, rotary_dim, interleaved, dtype):
    dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(1)
    tokens, block_size, blocks = 11, 4, 6
    angles = torch.rand(64, rotary_dim // 2, generator=generator) * 6
    rotary = Rotary(torch.cat([angles.cos(), angles.sin()], dim=1) * 1.3, interleaved)
    turn = shift(rotary, torch.arange(tokens), torch.arange(tokens) + 40) if rotary_dim else None
    layers, first = 3, 1
    kv = torch.randn(layers, 2, tokens, heads, dim, generator=generator).to(dtype)
    slots = torch.randperm(block_size * blocks, generator=generator)[:tokens]
    slots[3] = -1
    # Physically (blocks, tokens, heads, 2 * dim): the strides that FlashAttention's layout has.
    physical = (blocks, block_size, heads, 2 * dim)
    caches = [torch.full(physical, 7.0, dtype=dtype).transpose(1, 2) for _ in range(first + layers)]
    expected = [cache.clone() for cache in caches]
    for layer in range(layers):
        keys = kv[layer, 0] if turn is None else rotate(kv[layer, 0], *turn, interleaved)
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                place = expected[first + layer][slot // block_size, :, slot % block_size]
                place.copy_(torch.cat([keys[token], kv[layer, 1, token]], dim=-1))
    starts = torch.arange(tokens) * heads * dim
    steps = torch.full((tokens,), kv[0].numel())
    layer_range = range(first, first + layers)
    values = starts + tokens * heads * dim
    paged = PagedCaches(caches)
    given = (steps, slots, turn, interleaved, paged)
    rotate_scatter(kv, starts, values, *given, layer_range[:2], first)
    # As of a whole chunk, whose places are those of a layer before.
    rotate_scatter(kv, starts - steps, values - steps, *given, layer_range[2:], first - 1)
    for cache, wanted in zip(caches, expected, strict=True):
        torch.testing.assert_close(cache, wanted, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
"""

SHAPES = {
    "neox": (2, 16, 16, False),
    "gptj": (3, 16, 16, True),
    "partial": (2, 24, 16, False),
    "partial-gptj": (2, 16, 8, True),
    "no-rotation": (1, 16, 0, False),
}
CASES = {
    f"{name}-{dtype}": dict(zip(("heads", "dim", "rotary_dim", "interleaved", "dtype"), (*shape, dtype), strict=True))
    for name, shape in SHAPES.items()
    for dtype in ("float32", "bfloat16")
}


@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_plain_path(wrong, case):
    assert wrong[case] is None, wrong[case]
