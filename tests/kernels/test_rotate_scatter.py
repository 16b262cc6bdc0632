"""The fused kernel, in Triton's interpreter, against the plain path it stands in for."""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

# The interpreter must be chosen before Triton is imported, so the check runs in a process of its own.
CHECK = """
import torch
from kvblend_rag.blend.rope import Rotary, rotate, shift
from kvblend_rag.kernels.paged_caches import PagedCaches
from kvblend_rag.kernels.rotate_scatter import rotate_scatter

heads, dim, rotary_dim, interleaved, dtype = {heads}, {dim}, {rotary_dim}, {interleaved}, torch.{dtype}
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
caches = [
    torch.full((blocks, block_size, heads, 2 * dim), 7.0, dtype=dtype).transpose(1, 2) for _ in range(first + layers)
]
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
rotate_scatter(kv, starts, values, steps, slots, turn, interleaved, paged, layer_range[:2], first)
# As of a whole chunk, whose places are those of a layer before.
rotate_scatter(kv, starts - steps, values - steps, steps, slots, turn, interleaved, paged, layer_range[2:], first - 1)
for cache, wanted in zip(caches, expected, strict=True):
    torch.testing.assert_close(cache, wanted, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("heads", "dim", "rotary_dim", "interleaved"),
    [(2, 16, 16, False), (3, 16, 16, True), (2, 24, 16, False), (2, 16, 8, True), (1, 16, 0, False)],
    ids=["neox", "gptj", "partial", "partial-gptj", "no-rotation"],
)
def test_kernel_equals_plain_path(heads, dim, rotary_dim, interleaved, dtype):
    code = CHECK.format(heads=heads, dim=dim, rotary_dim=rotary_dim, interleaved=interleaved, dtype=dtype)
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
