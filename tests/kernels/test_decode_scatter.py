"""The kernel that decodes while it loads, in Triton's interpreter, against decoding and turning on the host."""

import pytest

CHECK = """
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from kvblend_rag.blend.rope import Rotary, rotate, shift
from kvblend_rag.kernels.decode_scatter import PIECES, decode_scatter, tiles_of
from kvblend_rag.kernels.paged_caches import PagedCaches
from kvblend_rag.store.encoded import encoded

# The interpreter cuts bfloat16 off, where a GPU rounds to the nearest.
cut = interpreter._convert_float

def convert(data, source, target, mode):
    if (source, target) != (tl.float32, tl.bfloat16):
        return cut(data, source, target, mode)
    return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.int16).numpy().view(np.uint16)

interpreter._convert_float = convert

block_size, blocks, layers, first = 4, 60, 3, 1
# (chunk, its first token, how many): whole and in part, one twice, one token, and within and across groups of 32.
RUNS = [
    (0, 0, 3), (1, 0, 70), (1, 2, 1), (1, 5, 9), (2, 0, 5), (1, 3, 40), (2, 4, 1), (1, 36, 33), (1, 69, 1), (0, 1, 2)
]


def check(encoding, dtype, shapes):
    dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(1)
    for heads, dim, rotary_dim, interleaved in shapes:
        chunks = []
        for tokens in (3, 70, 5):
            kv = torch.randn(layers, 2, tokens, heads, dim, generator=generator)
            kv[:, 0, :, :, ::7] *= 10
            kv[:, 1, ::5] *= 10
            chunks.append(encoded(kv.to(dtype), encoding))
        begins = np.cumsum([0] + [length for _, _, length in RUNS])
        total = int(begins[-1])
        angles = torch.rand(2 * total, max(rotary_dim // 2, 1), generator=generator) * 6
        rotary = Rotary(torch.cat([angles.cos(), angles.sin()], dim=1) * 1.3, interleaved)
        turn = shift(rotary, torch.arange(total), torch.arange(total) + 40) if rotary_dim else None
        slots = torch.randperm(block_size * blocks, generator=generator)[:total]
        slots[[3, 75]] = -1
        slots[begins[3] : begins[4]] = -1  # nothing of a tile is wanted
        # Physically (blocks, tokens, heads, 2 * dim): the strides that FlashAttention's layout has.
        physical = (blocks, block_size, heads, 2 * dim)
        caches = [torch.full(physical, 7.0, dtype=dtype).transpose(1, 2) for _ in range(first + layers)]
        expected = [cache.clone() for cache in caches]
        for layer in range(layers):
            parts = [chunks[chunk].decode()[layer, :, start : start + length] for chunk, start, length in RUNS]
            keys, values = torch.cat(parts, dim=1)
            keys = keys if turn is None else rotate(keys, *turn, interleaved)
            for token, slot in enumerate(slots.tolist()):
                if slot >= 0:
                    place = expected[first + layer][slot // block_size, :, slot % block_size]
                    place.copy_(torch.cat([keys[token], values[token]], dim=-1))
        # The chunks in one buffer, behind one another and behind bytes that are nobody's.
        ends = np.cumsum([64] + [-(-chunk.nbytes // 64) * 64 for chunk in chunks])
        staged = torch.full((int(ends[-1]),), 255, dtype=torch.uint8)
        for chunk, start in zip(chunks, ends):
            staged[start : start + chunk.nbytes] = chunk.buffer
        places = np.full((len(RUNS), PIECES, 2), -1)
        for index, (chunk, _, _) in enumerate(RUNS):
            kv = chunks[chunk]
            places[index, : len(kv.starts)] = [(ends[chunk] + start, kv.layer_nbytes) for start in kv.starts]
        table, counts = tiles_of(
            encoding,
            begins[:-1],
            np.array([start for _, start, _ in RUNS]),
            np.array([length for _, _, length in RUNS]),
            np.array([chunks[chunk].shape[2] for chunk, _, _ in RUNS]),
            places,
        )
        assert counts.sum() == len(table) and (table[:, 2] - table[:, 1]).sum() == total
        tiles, paged = torch.from_numpy(table), PagedCaches(caches)
        given = (slots, turn, interleaved, paged)
        decode_scatter(staged, tiles[:4], *given, range(first, first + 2), first, encoding)
        decode_scatter(staged, tiles[4:], *given, range(first, first + 2), first, encoding)
        # Places may be those of a layer before.
        early = table.copy()
        early[:, 5::2] -= early[:, 6::2]
        decode_scatter(staged, torch.from_numpy(early), *given, range(first + 2, first + 3), first - 1, encoding)
        for cache, wanted in zip(caches, expected, strict=True):
            assert torch.equal(cache, wanted), (heads, dim, rotary_dim, interleaved)
"""

# Heads, their dimension, of which so many are rotated, interleaved or not.
SHAPES = [
    (2, 16, 16, False),
    (1, 64, 64, False),
    (3, 16, 16, True),
    (1, 40, 40, True),
    (2, 24, 16, False),
    (2, 80, 8, True),
    (1, 16, 0, False),
    (2, 36, 0, True),
]
CASES = {
    f"{encoding}-{dtype}": {"encoding": encoding, "dtype": dtype, "shapes": SHAPES}
    for encoding in ("int8", "fp8", "int4")
    for dtype in ("float32", "bfloat16")
}


@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_host(wrong, case):
    assert wrong[case] is None, wrong[case]
