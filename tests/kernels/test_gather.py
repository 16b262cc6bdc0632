"""The gathering kernel, in Triton's interpreter, against indexing."""

import pytest

CHECK = """
import torch
from kvblend_rag.kernels.gather import gather
from kvblend_rag.kernels.paged_caches import PagedCaches


def check(heads, dim, tokens, dtype):
    dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(1)
    block_size, blocks, layers = 4, 6, 3
    # Physically (blocks, tokens, heads, 2 * dim): the strides that FlashAttention's layout has.
    caches = [
        torch.randn(blocks, block_size, heads, 2 * dim, generator=generator).to(dtype).transpose(1, 2)
        for _ in range(layers)
    ]
    slots = torch.randperm(block_size * blocks, generator=generator)[:tokens]
    rows = [cache[slots // block_size, :, slots % block_size] for cache in caches]
    expected = torch.stack([torch.stack([row[..., :dim], row[..., dim:]]) for row in rows])
    found = gather(PagedCaches(caches), slots)
    assert found.is_contiguous() and torch.equal(found, expected)
"""

SHAPES = [(2, 16, 11), (3, 24, 8), (1, 16, 1), (2, 16, 0)]
CASES = {
    f"{heads}-{dim}-{tokens}-{dtype}": {"heads": heads, "dim": dim, "tokens": tokens, "dtype": dtype}
    for heads, dim, tokens in SHAPES
    for dtype in ("float32", "bfloat16")
}


@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_indexing(wrong, case):
    assert wrong[case] is None, wrong[case]
