"""Stored keys turned to a new place equal those that vLLM's own rotary embedding computes there, for each kind."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

from kvblend_rag.blend.rope import Rotary, rotate, shift
from kvblend_rag.vllm_plugin.survey import Refused, _rotary, check_shift

HEAD, POSITIONS = 64, 4096

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(HEAD // 2)],
    "long_factor": [1.0 + 0.3 * i for i in range(HEAD // 2)],
}
KINDS = {
    "default": {"rope_type": "default"},
    "gpt-j": {"rope_type": "default", "neox": False},
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.5},
    "partial gpt-j": {"rope_type": "default", "partial_rotary_factor": 0.5, "neox": False},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    "longrope, long": {**LONGROPE, "original_max_position_embeddings": 1024},
    "longrope, short": {**LONGROPE, "original_max_position_embeddings": POSITIONS},
}


@pytest.fixture(params=KINDS)
def rope(request):
    settings = {"rope_theta": 10_000.0, **KINDS[request.param]}
    neox = settings.pop("neox", True)
    config = VllmConfig()
    config.model_config = SimpleNamespace(max_model_len=POSITIONS)  # LongRoPE picks its table by it
    with set_current_vllm_config(config):
        yield get_rope(HEAD, POSITIONS, is_neox_style=neox, rope_parameters=settings, dtype=torch.float32)


@pytest.fixture
def layer():
    """How the survey finds a layer's rotary table: through the module that owns the attention."""

    def layer(rope):
        model = torch.nn.Module()
        model.self_attn = torch.nn.Module()
        model.self_attn.rotary_emb = rope
        model.self_attn.attn = torch.nn.Module()
        return _rotary(model, "self_attn.attn")

    return layer


def test_turned_keys_are_the_models_own(rope, layer):
    found = layer(rope)
    raw = torch.randn(40, 2 * HEAD, generator=torch.Generator().manual_seed(0))
    stored, new = torch.arange(256, 296), torch.cat([torch.arange(3, 23), torch.arange(3900, 3920)])
    with torch.inference_mode():
        before, expected = (_forward(rope)(at, raw.clone(), raw.clone())[1].view(-1, 2, HEAD) for at in (stored, new))
    turned = rotate(before, *shift(found, stored, new), found.interleaved)
    assert (turned - expected).abs().max() < 2e-5
    assert (before - expected).abs().max() > 0.1


def _forward(rope):
    return getattr(rope, "forward_native", rope.forward)


def test_a_layer_without_a_rotary_module():
    model = torch.nn.Module()
    model.self_attn = torch.nn.Module()
    assert _rotary(model, "self_attn.attn") is None


class _Model:
    """A cache and a forward of one layer, which turns keys as ``turn`` says."""

    block_size, dtype, device = 128, torch.float32, torch.device("cpu")

    def __init__(self, turn, values_move=0.0):
        self._turn, self._values_move = turn, values_move
        self._keys, self._values = torch.randn(24, 2, HEAD), torch.randn(24, 2, HEAD)
        self._offset = 0

    def run(self, rows, around=None, position_offset=0):
        self._offset = position_offset

    def slots(self, block_ids, positions):
        return positions

    def read(self, layer, *where):
        at = torch.arange(24)
        return self._turn(self._keys, at + self._offset), self._values + self._values_move * self._offset


def _check(model, rotary, max_model_len=4096):
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=max_model_len, get_vocab_size=lambda: 1000))
    check_shift([SimpleNamespace(name="layers.0.attn", rotary=rotary)], model, model, config)


@pytest.fixture
def table():
    angles = torch.arange(POSITIONS)[:, None] * 10_000.0 ** -(torch.arange(0, HEAD, 2) / HEAD)
    return Rotary(torch.cat([angles.cos(), angles.sin()], dim=1), interleaved=False)


def turned(table, error=0):
    zero = torch.zeros(24, dtype=torch.int64)

    def turn(keys, positions):
        wrong = torch.where(positions >= 24, positions + error, positions)
        return rotate(keys, *shift(table, zero, wrong), table.interleaved)

    return turn


def test_the_start_up_check_passes_what_is_right(table):
    _check(_Model(turned(table)), table)
    _check(_Model(lambda keys, positions: keys), None)  # no rotation, and none is claimed
    _check(_Model(turned(table)), table, max_model_len=128)


@pytest.mark.parametrize("error", [1, -1, 100])
def test_the_start_up_check_catches_a_rotation_that_is_off_by_one(table, error):
    with pytest.raises(Refused, match=r"keys of layer layers\.0\.attn don't move with the position"):
        _check(_Model(turned(table, error)), table)


def test_the_start_up_check_catches_a_rotary_module_that_is_not_applied(table):
    with pytest.raises(Refused, match="keys of layer"):
        _check(_Model(lambda keys, positions: keys), table)


def test_the_start_up_check_catches_a_rotation_that_nobody_told_of(table):
    with pytest.raises(Refused, match="keys of layer"):
        _check(_Model(turned(table)), None)


def test_the_start_up_check_catches_the_wrong_pairs(table):
    with pytest.raises(Refused, match="keys of layer"):
        _check(_Model(turned(table)), Rotary(table.table, interleaved=True))


def test_the_start_up_check_catches_values_that_know_their_position(table):
    """Learned position embeddings."""
    with pytest.raises(Refused, match="values of layer"):
        _check(_Model(turned(table), values_move=0.01), table)
