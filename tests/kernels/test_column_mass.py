"""The attention kernel, in Triton's interpreter, against plain softmax attention."""

import pytest

CHECK = """
import torch
from kvblend_rag.kernels.column_mass import column_mass
from kvblend_rag.kernels.paged_caches import PagedCaches


def check(keys, dim):
    heads, kv_heads, block_size = 4, 2, 16
    generator = torch.Generator().manual_seed(0)
    blocks, layers = -(-keys // block_size), 3
    physical = (blocks + 5, block_size, kv_heads, 2 * dim)
    caches = [torch.full(physical, float("nan")).transpose(1, 2) for _ in range(layers)]
    table = torch.randperm(blocks + 5, generator=generator)[:blocks].to(torch.int32)
    stored = torch.randn(layers, keys, kv_heads, dim, generator=generator)
    for cache, tokens in zip(caches, stored, strict=True):
        for position in range(keys):
            cache[table[position // block_size].item(), :, position % block_size, :dim] = tokens[position]
    positions = torch.tensor([keys - 1, keys - 9, keys - 3])
    asked = [2, 0]
    queries = torch.randn(len(asked), 3, heads, dim, generator=generator)
    paged = PagedCaches(caches)
    found = column_mass(queries, positions, paged, paged.addresses_of(asked), table, keys, dim**-0.5)
    expected = torch.zeros(2, keys)
    hidden = torch.arange(keys)[None, :] > positions[:, None]
    for query, layer in zip(queries, asked, strict=True):
        each = stored[layer].repeat_interleave(heads // kv_heads, dim=1)
        logits = torch.einsum("qhd,khd->hqk", query, each) * dim**-0.5
        mass = logits.masked_fill(hidden, -torch.inf).softmax(-1).mean(0)
        expected += torch.stack([mass.mean(0), mass[0]])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
"""

CASES = {f"{keys}-{dim}": {"keys": keys, "dim": dim} for keys, dim in ((40, 16), (300, 16), (130, 24))}


@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_softmax(wrong, case):
    assert wrong[case] is None, wrong[case]
