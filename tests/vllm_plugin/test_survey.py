"""Engine options and layers that can't be blended are refused with the true reason; the others are not."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec, UniformTypeKVCacheSpecs

from kvblend_rag.vllm_plugin.worker.survey import Refused, refuse_options, survey_layers

MODEL = {
    "runner_type": "generate",
    "is_encoder_decoder": False,
    "is_hybrid": False,
    "is_attention_free": False,
    "is_moe": False,
    "uses_xdrope_dim": 0,
}
PARALLEL = {"pipeline_parallel_size": 1, "data_parallel_size": 1}


def config(model=None, parallel=None, cache_dtype="auto", speculative=None):
    return SimpleNamespace(
        model_config=SimpleNamespace(**{**MODEL, **(model or {})}),
        parallel_config=SimpleNamespace(**{**PARALLEL, **(parallel or {})}),
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
        speculative_config=speculative and SimpleNamespace(method=speculative),
        lora_config=object(),
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_dtype": "bfloat16"},
        {"speculative": "ngram"},
        {"speculative": "suffix"},
        {"parallel": {"data_parallel_size": 2}},
    ],
    ids=str,
)
def test_what_is_served(options):
    refuse_options(config(**options))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"model": {"runner_type": "pooling"}}, "not a generating model"),
        ({"model": {"is_encoder_decoder": True}}, "encoder-decoder"),
        ({"model": {"is_hybrid": True}}, "state-space layers"),
        ({"model": {"is_attention_free": True}}, "state-space layers"),
        ({"model": {"uses_xdrope_dim": 4}}, "XD-RoPE"),
        ({"parallel": {"pipeline_parallel_size": 2}}, "pipeline parallelism"),
        ({"parallel": {"decode_context_parallel_size": 2}}, "context parallelism"),
        ({"parallel": {"data_parallel_size": 2}, "model": {"is_moe": True}}, "mixture-of-experts"),
        ({"speculative": "eagle3"}, "speculative decoding with a draft model"),
        ({"speculative": "mtp"}, "speculative decoding with a draft model"),
        ({"cache_dtype": "fp8"}, r"the KV cache is quantised \(fp8\)"),
        ({"cache_dtype": "int8_per_token_head"}, r"the KV cache is quantised \(int8_per_token_head\)"),
    ],
    ids=str,
)
def test_what_is_refused(options, why):
    with pytest.raises(Refused, match=why):
        refuse_options(config(**options))


def layer(kind=Attention, cache=(4, 2, 16, 64), **attributes):
    """A layer of vLLM's class, made without its engine."""
    made = kind.__new__(kind)
    torch.nn.Module.__init__(made)
    made.kv_cache = torch.zeros(cache)
    made.impl = SimpleNamespace(do_kv_cache_update=lambda *_: None)
    made.attn_backend = SimpleNamespace(get_name=lambda: "SOME_BACKEND")
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def runner(*layers, spec=None, groups=None, supports_mm_inputs=False, builder=None, **model):
    modules = {f"model.layers.{number}.attn": each for number, each in enumerate(layers)}
    group = SimpleNamespace(kv_cache_spec=spec or full(), layer_names=list(reversed(modules)))
    return SimpleNamespace(
        get_model=lambda: SimpleNamespace(**model),
        supports_mm_inputs=supports_mm_inputs,
        kv_cache_config=SimpleNamespace(kv_cache_groups=[group] if groups is None else groups),
        attn_groups=[[SimpleNamespace(layer_names=list(modules), metadata_builders=[builder or SimpleNamespace()])]],
        vllm_config=SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=modules)),
    )


def full():
    return FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32)


def window():
    return SlidingWindowSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32, sliding_window=4096)


def state():
    return MambaSpec(block_size=16, shapes=((4, 4),), dtypes=(torch.float32,))


def together(*specs):
    """One kind of blocks for layers that differ."""
    return UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={f"{at}": spec for at, spec in enumerate(specs)})


def test_layers_come_in_the_order_in_which_they_run():
    found = survey_layers(runner(layer(), layer(), layer()))
    assert [each.name for each in found] == [f"model.layers.{number}.attn" for number in range(3)]
    assert all(each.sees_all for each in found)


def test_a_layer_with_a_window_among_others_is_served_and_known():
    near, far = survey_layers(runner(layer(sliding_window=256), layer(sliding_window=None)))
    assert not near.sees_all
    assert far.sees_all


def test_layers_that_differ_and_share_their_blocks_are_served():
    spec = together(dataclasses.replace(full(), sliding_window=256), full())
    near, far = survey_layers(runner(layer(sliding_window=256), layer(sliding_window=None), spec=spec))
    assert (near.sees_all, far.sees_all) == (False, True)


class Special(Attention):
    """An attention of another kind."""


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (lambda: runner(layer(), spec=window()), "all its layers see 4,096 tokens only"),
        (lambda: runner(layer(), spec=state()), "KV cache is of the kind MambaSpec"),
        (lambda: runner(layer(), spec=together(full(), state())), "KV cache is of the kind MambaSpec"),
        (lambda: runner(layer(), spec=together(window(), window())), "all its layers see 4,096 tokens only"),
        (lambda: runner(layer(), groups=[None, None]), "need 2 kinds of KV cache"),
        (lambda: runner(layer(), layer(Special)), r"layer model\.layers\.1\.attn is of the kind Special"),
        (lambda: runner(layer(kv_sharing_target_layer_name="model.layers.0.attn")), "share one KV cache"),
        (
            lambda: runner(layer(impl=SimpleNamespace(do_kv_cache_update=None, sinks=torch.zeros(4)))),
            "attention sinks are not served on a CPU",
        ),
        (lambda: runner(layer(impl=object())), "attention backend SOME_BACKEND has no separate KV write"),
        (lambda: runner(layer(), layer(cache=(4, 2, 16, 128))), "KV heads of different shapes"),
        (lambda: runner(layer(MLAAttention, (4, 16, 576))), "SOME_BACKEND has packed its up-projection away"),
        (lambda: runner(layer(), supports_mm_inputs=True, use_deepstack=True), "DeepStack"),
    ],
    ids=[
        "window",
        "state",
        "state beside attention",
        "windows alone",
        "two kinds",
        "special",
        "shared",
        "sinks",
        "no write",
        "shapes",
        "packed",
        "deepstack",
    ],
)
def test_layers_that_are_refused(made, why):
    with pytest.raises(Refused, match=why):
        survey_layers(made())


def test_one_window_for_layers_of_several_is_refused():
    windowed, all_seeing = layer(), layer()
    windowed.impl.sliding_window, all_seeing.impl.sliding_window = 256, -1
    with pytest.raises(Refused, match="takes one window for that of all layers"):
        survey_layers(runner(windowed, all_seeing, builder=SimpleNamespace(window_size=256)))
    mended = SimpleNamespace(window_size=256, _group_sliding_window=lambda: -1)
    assert len(survey_layers(runner(windowed, all_seeing, builder=mended))) == 2


def test_deepstack_for_text_alone_is_served():
    assert len(survey_layers(runner(layer(), use_deepstack=True))) == 1
