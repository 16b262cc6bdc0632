"""The kernel that reads chunks out of the paged caches, in Triton's interpreter, against indexing."""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

CHECK = """
import torch
from kvblend_rag.kernels.gather import gather
from kvblend_rag.kernels.paged_caches import PagedCaches

heads, dim, dtype = {heads}, {dim}, torch.{dtype}
generator = torch.Generator().manual_seed(1)
tokens, block_size, blocks, layers = 11, 4, 6, 3
# Physically (blocks, tokens, heads, 2 * dim): the strides that FlashAttention's layout has.
caches = [
    torch.randn(blocks, block_size, heads, 2 * dim, generator=generator).to(dtype).transpose(1, 2)
    for _ in range(layers)
]
slots = torch.randperm(block_size * blocks, generator=generator)[:tokens]
out = torch.full((layers, 2, tokens, heads, dim), 7.0, dtype=dtype)
gather(PagedCaches(caches), slots, out)
for cache, found in zip(caches, out, strict=True):
    rows = cache[slots // block_size, :, slots % block_size]
    assert torch.equal(found[0], rows[..., :dim])
    assert torch.equal(found[1], rows[..., dim:])
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("heads", "dim"), [(2, 16), (3, 24), (1, 16)])
def test_kernel_equals_indexing(heads, dim, dtype):
    code = CHECK.format(heads=heads, dim=dim, dtype=dtype)
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
