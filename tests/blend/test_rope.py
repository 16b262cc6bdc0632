import math

import pytest
import torch

from kvblend_rag.blend.rope import Rotary, rotate, shift

POSITIONS = 4096


def angles(dim: int) -> torch.Tensor:
    """(positions, dim / 2) float64: what each pair of dimensions is turned by."""
    frequencies = 10_000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return torch.arange(POSITIONS, dtype=torch.float64)[:, None] * frequencies


def rotary(dim: int, *, interleaved: bool = False, mscale: float = 1.0, dtype: torch.dtype = torch.float32) -> Rotary:
    turned = angles(dim)
    return Rotary((torch.cat([turned.cos(), turned.sin()], dim=1) * mscale).to(dtype), interleaved)


def directly(
    raw: torch.Tensor, positions: torch.Tensor, dim: int, *, interleaved: bool = False, mscale: float = 1.0
) -> torch.Tensor:
    """Raw keys as a model stores them: each pair of dimensions a complex number, turned, in float64."""
    first, second = (slice(0, dim, 2), slice(1, dim, 2)) if interleaved else (slice(0, dim // 2), slice(dim // 2, dim))
    pairs = torch.complex(raw[..., first].double(), raw[..., second].double())
    turned = (
        pairs * torch.polar(torch.ones(len(positions), dim // 2, dtype=torch.float64), angles(dim)[positions])[:, None]
    )
    out = raw.double().clone()
    out[..., first], out[..., second] = turned.real * mscale, turned.imag * mscale
    return out


@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "gpt-j"])
@pytest.mark.parametrize(("head_dim", "dim"), [(64, 64), (64, 32), (96, 48)], ids=["whole", "half", "of-96"])
@pytest.mark.parametrize("mscale", [1.0, 1.37], ids=["plain", "mscale"])
def test_a_rotated_key_is_the_key_the_model_would_have_stored(interleaved, head_dim, dim, mscale):
    stored = torch.arange(256, 296)
    new = torch.cat([torch.arange(10, 30), torch.arange(3000, 3020)])  # backwards and forwards
    raw = torch.randn(40, 2, head_dim, generator=torch.Generator().manual_seed(0))
    table = rotary(dim, interleaved=interleaved, mscale=mscale)
    before = directly(raw, stored, dim, interleaved=interleaved, mscale=mscale).float()
    expected = directly(raw, new, dim, interleaved=interleaved, mscale=mscale).float()
    found = rotate(before, *shift(table, stored, new), interleaved)
    assert (found - expected).abs().max() < 5e-6
    assert torch.equal(found[..., dim:], before[..., dim:])  # what isn't rotary is not touched
    assert (before - expected).abs().max() > 0.1


def test_a_shift_by_nothing_changes_nothing_and_one_by_one_does():
    at = torch.arange(64)
    keys = torch.randn(64, 2, 32)
    assert torch.allclose(rotate(keys, *shift(rotary(32), at, at), False), keys, atol=1e-6)
    assert (rotate(keys, *shift(rotary(32), at, at + 1), False) - keys).abs().max() > 0.5


def test_there_and_back():
    here, there = torch.arange(64), torch.arange(64) + 1234
    keys, table = torch.randn(64, 2, 32), rotary(32)
    once = rotate(keys, *shift(table, here, there), False)
    assert torch.allclose(rotate(once, *shift(table, there, here), False), keys, atol=1e-5)


def test_bfloat16_keys_keep_their_dtype_and_lose_one_rounding_only():
    stored, new = torch.arange(256, 320), torch.arange(40, 104)
    raw = torch.randn(64, 2, 64)
    before = directly(raw, stored, 64).bfloat16()
    exact = rotate(before.float(), *shift(rotary(64), stored, new), False)
    found = rotate(before, *shift(rotary(64), stored, new), False)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.bfloat16())


def test_a_table_in_bfloat16_still_turns_by_an_angle():
    """vLLM may keep its table in the model's dtype, so rows are not quite of length one; a shift must not grow keys."""
    table = rotary(64, dtype=torch.bfloat16)
    cos, sin = shift(table, torch.arange(500), torch.arange(500) + 700)
    lengths = (cos.square() + sin.square()).sqrt()
    assert (lengths - 1).abs().max() < 2**-7


def test_leading_dimensions_are_carried_along():
    keys = torch.randn(3, 2, 20, 4, 32)
    cos, sin = shift(rotary(32), torch.arange(20), torch.arange(20) + 7)
    whole = rotate(keys, cos, sin, False)
    assert torch.equal(whole[1, 0], rotate(keys[1, 0], cos, sin, False))


def test_keys_that_were_given_are_not_written_to():
    keys = torch.randn(20, 4, 32)
    copy = keys.clone()
    rotate(keys, *shift(rotary(32), torch.arange(20), torch.arange(20) + 7), False)
    assert torch.equal(keys, copy)


def test_attention_depends_on_distance_alone():
    """What rotation is for: a query and a key moved together see each other as before."""
    query, key, table = torch.randn(1, 1, 32), torch.randn(1, 1, 32), rotary(32)
    zero = torch.zeros(1, dtype=torch.int64)

    def logit(query_at: int, key_at: int) -> float:
        turned = [
            rotate(what, *shift(table, zero, zero + at), False) for what, at in ((query, query_at), (key, key_at))
        ]
        return float((turned[0] * turned[1]).sum())

    assert math.isclose(logit(100, 60), logit(2100, 2060), abs_tol=1e-3)
    assert not math.isclose(logit(100, 60), logit(100, 61), abs_tol=1e-3)
