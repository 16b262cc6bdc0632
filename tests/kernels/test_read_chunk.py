"""Reading a chunk out of a paged cache: by the kernel as where there is none, in Triton's interpreter."""

import pytest

pytest.importorskip("vllm")

CHECK = """
from types import SimpleNamespace

import numpy as np
import torch

from kvblend_rag.kernels.paged_caches import PagedCaches
from kvblend_rag.vllm_plugin.worker.paged_kv import AttentionLayer, PagedKV

layers, blocks, rows, heads, dim = 3, 9, 16, 2, 32
generator = torch.Generator().manual_seed(0)


def write(layer, keys, values, cache, slots):
    cache[slots // rows, :, slots % rows] = torch.cat([keys, values], dim=-1)


def layer(name):
    # Physically (blocks, tokens, heads, 2 * dim): the strides that FlashAttention's layout has.
    cache = torch.randn(blocks, rows, heads, 2 * dim, generator=generator).transpose(1, 2)
    return AttentionLayer(name, SimpleNamespace(kv_cache=cache, impl=SimpleNamespace(do_kv_cache_update=write)))


def check(block_size):
    paged = PagedKV([layer(str(number)) for number in range(layers)], block_size)
    table = np.array([3, 1, 2] if block_size > rows else [7, 2, 5, 1], dtype=np.int32)
    for start, stop in ((0, 40), (11, 49), (16, 17)):
        assert paged.caches is None
        plain = paged.read_chunk(table, start, stop)
        paged.caches = PagedCaches([each.cache for each in paged.layers])
        kernel = paged.read_chunk(table, start, stop)
        paged.caches = None
        assert plain.shape == (layers, 2, stop - start, heads, dim)
        assert torch.equal(plain, kernel), (block_size, start, stop)
        token = 0
        block, row = table[start // block_size] * (block_size // rows) + start % block_size // rows, start % rows
        for index, each in enumerate(paged.layers):
            assert torch.equal(plain[index, :, token], each.cache[block, :, row].unflatten(1, (2, dim)).transpose(0, 1))
"""

# A block of vLLM's may be several of the backend's, which have 16 rows.
CASES = {f"blocks of {size}": {"block_size": size} for size in (16, 32)}


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_reads_what_the_plain_path_reads(wrong, case):
    assert wrong[case] is None, wrong[case]
