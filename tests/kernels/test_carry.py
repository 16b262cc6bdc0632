"""The kernels that carry over, in Triton's interpreter, against the plain path."""

import pytest

CHECK = """
import torch
from kvblend_rag.blend.rope import Rotary, rotate, shift
from kvblend_rag.kernels.carry import changes, move
from kvblend_rag.kernels.paged_caches import PagedCaches


def check(heads, dim, rotary_dim, interleaved, dtype):
    dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(1)
    block_size, blocks, layers, at = 4, 6, 3, 2
    angles = torch.rand(64, max(rotary_dim // 2, 1), generator=generator) * 6
    rotary = Rotary(torch.cat([angles.cos(), angles.sin()], dim=1) * 1.3, interleaved)

    def turned(keys, turn):
        return keys if turn is None else rotate(keys, *turn, interleaved)

    def turn(start, stop):
        return shift(rotary, start, stop) if rotary_dim else None

    # Physically (blocks, tokens, heads, 2 * dim): the strides that FlashAttention's layout has.
    caches = [
        torch.randn(blocks, block_size, heads, 2 * dim, generator=generator).to(dtype).transpose(1, 2)
        for _ in range(layers)
    ]
    paged, before = PagedCaches(caches), [cache.clone() for cache in caches]
    order = torch.randperm(block_size * blocks, generator=generator)
    shown, others = order[:5], order[5:16]
    # As they come out of one matrix product.
    new = torch.randn(9, 3, heads, dim, generator=generator).to(dtype)
    keys, values, among = new[:, 1], new[:, 2], torch.tensor([3, 0, 8, 5, 1])
    back = turn(torch.arange(5) + 20, torch.zeros(5, dtype=torch.int64))
    found = changes(keys, values, among, shown, back, interleaved, paged, at)
    rows = before[at][shown // block_size, :, shown % block_size].float()
    expected = torch.cat(
        [turned(keys[among].float() - rows[..., :dim], back), values[among].float() - rows[..., dim:]], dim=1
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    moves = torch.randn(3, 2 * heads, dim, generator=generator)
    runs, forth = torch.arange(11) % 3, turn(torch.zeros(11, dtype=torch.int64), torch.arange(11) + 30)
    move(moves, runs, others, forth, interleaved, paged, at)
    by_key, by_value = moves[runs].chunk(2, dim=1)
    wanted = [cache.clone() for cache in before]
    for token, slot in enumerate(others.tolist()):
        place = wanted[at][slot // block_size, :, slot % block_size]
        one = None if forth is None else (forth[0][token : token + 1], forth[1][token : token + 1])
        change = torch.cat([turned(by_key[token : token + 1], one)[0], by_value[token]], dim=-1)
        place.copy_((place.float() + change).to(dtype))
    for cache, right in zip(caches, wanted, strict=True):
        torch.testing.assert_close(cache, right, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
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
