"""The gathering kernel, in Triton's interpreter, against indexing."""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

# The interpreter must be chosen before Triton is imported, so the check runs in a process of its own.
CHECK = """
import torch
from kvblend_rag.kernels.gather import gather
from kvblend_rag.kernels.paged_caches import PagedCaches

heads, dim, dtype = {heads}, {dim}, torch.{dtype}
generator = torch.Generator().manual_seed(1)
tokens, block_size, blocks, layers = {tokens}, 4, 6, 3
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("heads", "dim", "tokens"), [(2, 16, 11), (3, 24, 8), (1, 16, 1), (2, 16, 0)])
def test_kernel_equals_indexing(heads, dim, tokens, dtype):
    code = CHECK.format(heads=heads, dim=dim, tokens=tokens, dtype=dtype)
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
