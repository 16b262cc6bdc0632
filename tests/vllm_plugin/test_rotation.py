"""Stored keys turned to a new place equal those that vLLM's own rotary embedding computes there, for each kind."""

import functools
import inspect
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.rotary_embedding import get_rope

from kvblend_rag.blend.rope import Rotary, rotate, shift
from kvblend_rag.vllm_plugin.worker.paged_kv import AttentionLayer
from kvblend_rag.vllm_plugin.worker.rotary import NoShift, Rotations, table_of
from kvblend_rag.vllm_plugin.worker.survey import Refused, check_shift

HEAD, POSITIONS = 64, 4096
ORIGINAL = {"original_max_position_embeddings": 1024}
SECTIONS = {"mrope_section": [8, 12, 12]}

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(HEAD // 2)],
    "long_factor": [1.0 + 0.3 * i for i in range(HEAD // 2)],
}
FOPE = {
    "rope_type": "default",
    "use_fope": True,
    "num_key_value_heads": 2,
    "num_inv_freq": None,
    "fope_sep_head": True,
    "fope_init_factor": 0.1,
}
# name: (class in vLLM, parameters as in a model's config.json; ``neox`` is what the model's code passes)
KINDS = {
    "default": ("RotaryEmbedding", {"rope_type": "default"}),
    "gpt-j": ("RotaryEmbedding", {"rope_type": "default", "neox": False}),
    "partial": ("RotaryEmbedding", {"rope_type": "default", "partial_rotary_factor": 0.5}),
    "partial gpt-j": ("RotaryEmbedding", {"rope_type": "default", "partial_rotary_factor": 0.5, "neox": False}),
    "another theta": ("RotaryEmbedding", {"rope_type": "default", "rope_theta": 5_000_000.0}),
    "proportional": ("Gemma4RotaryEmbedding", {"rope_type": "proportional", "partial_rotary_factor": 0.25}),
    "linear": ("LinearScalingRotaryEmbedding", {"rope_type": "linear", "factor": 4.0}),
    "ntk": ("NTKScalingRotaryEmbedding", {"rope_type": "ntk", "factor": 4.0}),
    "ntk, mixed": ("NTKScalingRotaryEmbedding", {"rope_type": "ntk", "factor": 4.0, "mixed_b": 0.5}),
    "dynamic ntk": ("DynamicNTKScalingRotaryEmbedding", {"rope_type": "dynamic", "factor": 2.0}),
    "dynamic ntk, alpha": ("DynamicNTKAlphaRotaryEmbedding", {"rope_type": "dynamic", "alpha": 1000.0}),
    "llama3": (
        "Llama3RotaryEmbedding",
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
    ),
    "yarn": ("YaRNScalingRotaryEmbedding", {"rope_type": "yarn", "factor": 4.0, **ORIGINAL}),
    "yarn, not truncated": (
        "YaRNScalingRotaryEmbedding",
        {"rope_type": "yarn", "factor": 4.0, "truncate": False, "attention_factor": 1.7, **ORIGINAL},
    ),
    "deepseek yarn": (
        "DeepseekScalingRotaryEmbedding",
        {"rope_type": "deepseek_yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5, "neox": False, **ORIGINAL},
    ),
    "deepseek llama": (
        "DeepseekScalingRotaryEmbedding",
        {"rope_type": "deepseek_llama_scaling", "factor": 4.0, "neox": False, **ORIGINAL},
    ),
    "deepseek v4": (
        "DeepseekV4ScalingRotaryEmbedding",
        {"rope_type": "deepseek_yarn", "is_deepseek_v4": True, "factor": 4.0, "neox": False, **ORIGINAL},
    ),
    "longrope, long": ("Phi3LongRoPEScaledRotaryEmbedding", {**LONGROPE, **ORIGINAL}),
    "longrope, short": (
        "Phi3LongRoPEScaledRotaryEmbedding",
        {**LONGROPE, "original_max_position_embeddings": POSITIONS},
    ),
    "m-rope": ("MRotaryEmbedding", {"rope_type": "default", **SECTIONS}),
    "m-rope, interleaved": ("MRotaryEmbedding", {"rope_type": "default", "mrope_interleaved": True, **SECTIONS}),
    "m-rope, yarn": ("MRotaryEmbedding", {"rope_type": "yarn", "factor": 4.0, **ORIGINAL, **SECTIONS}),
    "openpangu": (
        "MRotaryEmbeddingInterleaved",
        {"rope_type": "openpangu", "mrope_interleaved": True, **SECTIONS},
    ),
    "bailing m-rope": ("BailingMRotaryEmbedding", {"rope_type": "bailing_mrope", **SECTIONS}),
}
REFUSED = {
    "fourier": ("FourierRotaryEmbedding", FOPE),
    "llama 4 vision": ("Llama4VisionRotaryEmbedding", {"rope_type": "mllama4", "neox": False}),
}
NEEDS_CUDA = {"DualChunkRotaryEmbedding"}
GONE = {"XDRotaryEmbedding", "TeleChat3RoPEScaledRotaryEmbedding"}
"""Before vLLM 0.32 alone; the check at start decides."""


@functools.cache
def rope(name):
    kind, parameters = {**KINDS, **REFUSED}[name]
    if not hasattr(rotary_embedding, kind):
        pytest.skip(f"this vLLM has no {kind}")
    parameters = {"rope_theta": 10_000.0, **parameters}
    neox = parameters.pop("neox", True)
    config = VllmConfig()
    config.model_config = SimpleNamespace(max_model_len=POSITIONS)  # LongRoPE picks its table by it
    with set_current_vllm_config(config):
        made = get_rope(HEAD, POSITIONS, is_neox_style=neox, rope_parameters=parameters, dtype=torch.float32)
    assert type(made).__name__ == kind
    return made


def attention_of(*modules, **attributes):
    """A model of one attention layer, which owns rotary modules and attributes as vLLM's models do."""
    model = torch.nn.Module()
    model.self_attn = torch.nn.Module()
    for place, module in enumerate(modules):
        setattr(model.self_attn, f"rotary_emb{place or ''}", module)
    for name, value in attributes.items():
        setattr(model.self_attn, name, value)
    model.self_attn.attn = torch.nn.Module()
    return model


@functools.cache
def found_in(name):
    return rotations(attention_of(rope(name)))


def rotations(model):
    return Rotations(model, POSITIONS).of("self_attn.attn")


def computed(module, positions, raw):
    """Keys as the module makes them, text alone: M-RoPE's three rows of positions are one and the same."""
    if type(module).__name__ == "MRotaryEmbeddingInterleaved":
        positions = positions.expand(3, -1)
    forward = getattr(module, "forward_native", module.forward)
    if "Deepseek" in type(module).__name__:
        return forward(positions, raw.clone(), raw.clone())[1]
    flat = raw.flatten(1)
    return forward(positions, flat.clone(), flat.clone())[1].view(-1, 2, HEAD)


def test_every_kind_that_vllm_knows_is_here():
    classes = {
        name
        for name, value in vars(rotary_embedding).items()
        if inspect.isclass(value) and issubclass(value, torch.nn.Module)
    }
    assert classes - NEEDS_CUDA - GONE <= {kind for kind, _ in (*KINDS.values(), *REFUSED.values())}


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=20, deadline=None)
@given(st.integers(0, POSITIONS - 17), st.integers(0, POSITIONS - 17), st.integers(0, 2**31))
def test_turned_keys_are_the_models_own(name, stored, new, seed):
    module = rope(name)
    found, none = found_in(name)
    assert none is None
    raw = torch.randn(16, 2, HEAD, generator=torch.Generator().manual_seed(seed))
    here, there = torch.arange(stored, stored + 16), torch.arange(new, new + 16)
    with torch.inference_mode():
        before, expected = computed(module, here, raw), computed(module, there, raw)
    turned = rotate(before, *shift(found, here, there), found.interleaved)
    assert (turned - expected).abs().max() < 2e-5
    assert abs(stored - new) < 100 or (before - expected).abs().max() > 0.1


@pytest.mark.parametrize("name", [name for name in KINDS if "m-rope" in name])
def test_text_alone_has_one_position_a_token(name):
    """As vLLM gives it to a model with M-RoPE: three equal rows."""
    module, raw, at = rope(name), torch.randn(16, 2 * HEAD), torch.arange(300, 316)
    with torch.inference_mode():
        keys = [module.forward_native(places, raw.clone(), raw.clone())[1] for places in (at, at.expand(3, -1))]
    assert torch.equal(*keys)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_rotation_is_refused_with_its_name(name):
    kind, _ = REFUSED[name]
    module = rope(name)
    if kind == "FourierRotaryEmbedding":
        for coefficients in (module.cos_coef, module.sin_coef):
            coefficients.data.normal_()
        module.cos_sin_cache.copy_(module._compute_cos_sin_cache())
    with pytest.raises(NoShift, match=f"its rotary embedding, {kind}, is no rotation by one angle"):
        table_of(module)


def test_a_table_whose_keys_grow_is_refused():
    module = torch.nn.Module()
    module.rotary_dim = module.head_size = HEAD
    module.cos_sin_cache = rope("default").cos_sin_cache * torch.linspace(1, 2, POSITIONS)[:, None]
    with pytest.raises(NoShift, match="makes keys larger or smaller"):
        table_of(module)


def test_a_rotation_behind_dimensions_that_are_not_turned():
    """DeepSeek: half a row of the cache is latent and then turned; without MLA, a part without position is in front."""
    module = rope("deepseek yarn")
    (latent, _), (plain, _) = (
        rotations(attention_of(module, qk_rope_head_dim=HEAD, qk_nope_head_dim=32, kv_lora_rank=128, **more))
        for more in ({"mla_attn": torch.nn.Module()}, {})
    )
    here, there = torch.arange(16) + 40, torch.arange(16) + 2000
    raw = torch.randn(16, 1, HEAD)
    with torch.inference_mode():
        before, expected = (computed(module, at, raw) for at in (here, there))
    for found, front in ((latent, torch.randn(16, 1, (128 - HEAD) // 2)), (plain, torch.randn(16, 1, 32))):
        turned = rotate(torch.cat([front, before], -1), *shift(found, here, there), found.interleaved)
        assert torch.equal(turned[..., : front.shape[-1]], front)
        assert (turned[..., front.shape[-1] :] - expected).abs().max() < 2e-5


def test_halves_behind_other_dimensions_are_refused():
    model = attention_of(rope("default"), qk_rope_head_dim=HEAD, qk_nope_head_dim=32, kv_lora_rank=128)
    with pytest.raises(NoShift, match="only neighbouring pairs can be moved"):
        rotations(model)


def test_layers_share_a_table():
    model = attention_of(rope("deepseek yarn"), qk_rope_head_dim=HEAD, qk_nope_head_dim=32, kv_lora_rank=128)
    model.second = model.self_attn
    all_rotations = Rotations(model, POSITIONS)
    first, second = (all_rotations.of(f"{name}.attn")[0] for name in ("self_attn", "second"))
    assert first is second


def test_a_layer_without_a_rotary_module():
    assert rotations(attention_of()) == [None]
    assert Rotations(torch.nn.Module(), POSITIONS).of("no.such.layer") == [None]


def transformers_model(name, **settings):
    """A model of Transformers' own code, held as vLLM's Transformers backend holds it."""
    import transformers

    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": POSITIONS}
    config = getattr(transformers, name)(**{**sizes, **heads, **settings}, pad_token_id=0)
    backend = torch.nn.Module()
    backend.model = transformers.AutoModel.from_config(config)
    backend.text_config = config
    backend.model_config = SimpleNamespace(dtype=torch.float32)
    return backend


YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 1024}
TWO_TABLES = {
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": YARN,
    },
}


@pytest.mark.parametrize(
    ("name", "layer", "which", "settings"),
    [
        ("LlamaConfig", 0, 0, {"rope_parameters": YARN}),
        ("GlmConfig", 0, 1, {"head_dim": 64, "partial_rotary_factor": 0.5}),
        ("CohereConfig", 0, 1, {}),
        ("Olmo3Config", 0, 0, TWO_TABLES),
        ("Olmo3Config", 1, 0, TWO_TABLES),
    ],
)
def test_the_rotation_of_transformers_own_code(name, layer, which, settings):
    """One of the two pairings is its own; which one, the start-up check measures."""
    backend = transformers_model(name, **settings)
    found = Rotations(backend, POSITIONS).of(f"model.layers.{layer}.self_attn.attn")
    assert [each is None or each.interleaved for each in found] == [False, True, True]
    module = inspect.getmodule(type(backend.model))
    rotary, raw = backend.model.rotary_emb, torch.randn(1, 2, 16, HEAD)
    kind = (backend.text_config.layer_types[layer],) if "Olmo3" in name else ()

    def at(start):
        places = torch.arange(start, start + 16)
        cos, sin = rotary(raw, places[None], *kind)
        return places, module.apply_rotary_pos_emb(raw, raw, cos, sin)[1][0].transpose(0, 1)

    (here, before), (there, expected) = at(30), at(3000)
    errors = [
        (rotate(before, *shift(each, here, there), each.interleaved) - expected).abs().max() for each in found[:2]
    ]
    assert errors[which] < 5e-3 < 0.1 < errors[1 - which]


def test_layers_of_one_model_may_turn_by_different_tables():
    backend = transformers_model("Olmo3Config", **TWO_TABLES)
    all_rotations = Rotations(backend, POSITIONS)
    near, far = (all_rotations.of(f"model.layers.{layer}.self_attn.attn")[0].table for layer in (0, 1))
    assert near.shape == far.shape
    assert not torch.allclose(near, far, atol=0.1)


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
        {"rope_theta": 10_000.0, **LONGROPE, "original_max_position_embeddings": 1024, "factor": 4.0},
    ],
    ids=["dynamic ntk", "longrope"],
)
def test_frequencies_that_change_with_the_length_are_refused(parameters):
    """In Transformers' own code; vLLM's modules settle them at start."""
    backend = transformers_model("LlamaConfig", rope_parameters=parameters)
    with pytest.raises(NoShift, match="changes its frequencies with the prompt's length"):
        Rotations(backend, POSITIONS).of("model.layers.0.self_attn.attn")


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


def _check(cache, rotary, max_model_len=4096):
    """The rotation found, where the model's module has the given one."""
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=max_model_len, get_vocab_size=lambda: 1000))
    modules = []
    if rotary is not None:
        modules = [torch.nn.Module()]
        modules[0].head_size, modules[0].rotary_dim = HEAD, HEAD
        modules[0].cos_sin_cache, modules[0].is_neox_style = rotary.table, not rotary.interleaved
    layer = AttentionLayer("self_attn.attn", None)
    cache.model = attention_of(*modules)
    check_shift([layer], cache, cache, config)
    return cache.layers[0].rotary


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
    for longest in (4096, 128):
        found = _check(_Model(turned(table)), table, longest)
        assert found.table is table.table
        assert not found.interleaved
    assert _check(_Model(lambda keys, positions: keys), None) is None


def test_the_start_up_check_finds_a_rotary_module_that_is_not_applied(table):
    """Layers without a position in Cohere2, EXAONE 4 and others own one all the same."""
    assert _check(_Model(lambda keys, positions: keys), table) is None


@pytest.mark.parametrize("error", [1, -1, 100])
def test_the_start_up_check_catches_a_rotation_that_is_off_by_one(table, error):
    with pytest.raises(Refused, match=r"keys of layer self_attn\.attn don't move with the position"):
        _check(_Model(turned(table, error)), table)


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
