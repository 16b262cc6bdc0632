"""The attention kernel, in Triton's interpreter, against plain softmax attention."""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

CHECK = """
import torch
from kvblend_rag.kernels.column_mass import column_mass

keys, heads, kv_heads, dim, block_size = {keys}, 4, 2, {dim}, 16
generator = torch.Generator().manual_seed(0)
blocks = -(-keys // block_size)
cache = torch.full((blocks + 5, block_size, kv_heads, 2 * dim), float("nan")).transpose(1, 2)
table = torch.randperm(blocks + 5, generator=generator)[:blocks].to(torch.int32)
stored = torch.randn(keys, kv_heads, dim, generator=generator)
for position in range(keys):
    cache[table[position // block_size].item(), :, position % block_size, :dim] = stored[position]
positions = torch.tensor([keys - 1, keys - 9, keys - 3])
queries = torch.randn(3, heads, dim, generator=generator)
found = column_mass(queries, positions, cache, table, keys, dim**-0.5)
logits = torch.einsum("qhd,khd->hqk", queries, stored.repeat_interleave(heads // kv_heads, dim=1)) * dim**-0.5
hidden = torch.arange(keys)[None, :] > positions[:, None]
mass = logits.masked_fill(hidden, -torch.inf).softmax(-1).mean(0)
torch.testing.assert_close(found, torch.stack([mass.mean(0), mass[0]]), rtol=1e-4, atol=1e-6)
"""


@pytest.mark.parametrize(("keys", "dim"), [(40, 16), (300, 16), (130, 24)])
def test_kernel_equals_softmax(keys, dim):
    done = subprocess.run(
        [sys.executable, "-c", CHECK.format(keys=keys, dim=dim)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
