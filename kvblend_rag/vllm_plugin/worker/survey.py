"""Survey: what the loaded model's attention looks like, and whether it can be blended.

Everything that can be known at start is found out here, once, and a model that we can't serve right
is refused with the reason; it then runs as plain vLLM.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention, MLAAttention
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from kvblend_rag.blend.rope import Rotary, rotate, shift
from kvblend_rag.vllm_plugin import compat
from kvblend_rag.vllm_plugin.worker.forward import Row, ScatteredForward
from kvblend_rag.vllm_plugin.worker.latent import LatentLayer
from kvblend_rag.vllm_plugin.worker.paged_kv import AttentionLayer, PagedKV
from kvblend_rag.vllm_plugin.worker.rotary import NoShift, Rotations

# Methods of speculative decoding without layers of their own.
_DRAFTLESS = ("ngram", "ngram_gpu", "suffix")

_PROBE_TOKENS = 24
_PROBE_SHIFT = 1000


class Refused(Exception):
    """The model or an option can't be blended; the message is the reason."""


def refuse_options(config: VllmConfig) -> None:
    """Raise Refused for an engine option that blending does not serve."""
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    reasons = [
        (model.runner_type != "generate", "it is not a generating model"),
        (model.is_encoder_decoder, "it is an encoder-decoder model"),
        (model.is_hybrid or model.is_attention_free, "it has state-space layers, whose state is no KV"),
        (bool(getattr(model, "uses_xdrope_dim", 0)), "XD-RoPE is not served"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism is not served yet"),
        (getattr(parallel, "decode_context_parallel_size", 1) > 1, "context parallelism is not served"),
        (getattr(parallel, "prefill_context_parallel_size", 1) > 1, "context parallelism is not served"),
        (
            parallel.data_parallel_size > 1 and model.is_moe,
            "a forward of our own would hang mixture-of-experts layers under data parallelism",
        ),
        (
            config.speculative_config is not None and config.speculative_config.method not in _DRAFTLESS,
            "speculative decoding with a draft model is enabled, whose KV of a chunk is not stored; "
            "'ngram' and 'suffix' need none",
        ),
        (
            cache.cache_dtype not in ("auto", "float16", "bfloat16", "float32"),
            f"the KV cache is quantised ({cache.cache_dtype})",
        ),
    ]
    for applies, reason in reasons:
        if applies:
            raise Refused(reason)


def survey_layers(runner: Any) -> list[AttentionLayer]:
    """The model's attention layers in running order, their rotations still unknown.

    Raises:
        Refused: the layers or their cache are of a kind that can't be blended.
    """
    if getattr(runner.get_model(), "use_deepstack", False) and runner.supports_mm_inputs:
        raise Refused(
            "it holds the running step's image features outside of its inputs (DeepStack), where a forward of our own "
            "would take them up: start it for text alone, limit_mm_per_prompt={'image': 0, 'video': 0}"
        )
    groups = runner.kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise Refused(f"its layers need {len(groups)} kinds of KV cache (hybrid or sliding-window attention)")
    spec = groups[0].kv_cache_spec
    # One spec a layer where they differ and still share their blocks: on a GPU, windows beside none (0.26).
    for each in spec.kv_cache_specs.values() if isinstance(spec, UniformTypeKVCacheSpecs) else (spec,):
        if isinstance(each, SlidingWindowSpec):
            windows = f"all its layers see {each.sliding_window:,} tokens only"
            raise Refused(f"{windows}, and vLLM drops the KV in front of them")
        if type(each) not in (FullAttentionSpec, MLAAttentionSpec):
            raise Refused(f"its KV cache is of the kind {type(each).__name__}, not full attention")
    if compat.confuses_windows(runner):
        raise Refused(f"vLLM {compat.version()} on a CPU takes one window for that of all layers: 0.32 is right")
    modules = runner.vllm_config.compilation_config.static_forward_context
    order = list(modules)
    layers = [_layer(name, modules[name]) for name in sorted(groups[0].layer_names, key=order.index)]
    shapes = {layer.cache.shape[1:] for layer in layers}
    if len(shapes) != 1:
        raise Refused("its layers have KV heads of different shapes")
    return layers


def _layer(name: str, module: Any) -> AttentionLayer:
    if type(module) not in (Attention, ChunkedLocalAttention, MLAAttention):
        raise Refused(f"layer {name} is of the kind {type(module).__name__}, not plain attention")
    if getattr(module, "kv_sharing_target_layer_name", None):
        raise Refused("some of its layers share one KV cache")
    if not hasattr(module.impl, "do_kv_cache_update"):
        raise Refused(f"the attention backend {module.attn_backend.get_name()} has no separate KV write")
    if getattr(module.impl, "sinks", None) is not None and module.kv_cache.device.type == "cpu":
        raise Refused(
            "attention sinks are not served on a CPU: vLLM's own answers depend there on how a prompt is batched"
        )
    if not isinstance(module, MLAAttention):
        return AttentionLayer(name, module)
    if not hasattr(module, "W_UK_T"):
        raise Refused(f"the attention backend {module.attn_backend.get_name()} has packed its up-projection away")
    return LatentLayer(name, module)


@torch.inference_mode()
def check_shift(layers: list[AttentionLayer], paged: PagedKV, forward: ScatteredForward, config: VllmConfig) -> None:
    """Compute the same tokens at two places and compare: rotated keys must equal computed ones.

    Finds out which of the rotations that its modules allow a layer applies. Catches what no list can: rotary
    modules that are there and not applied, scaled or length-dependent frequencies, learned positions. Uses free
    blocks, before the first request. Leaves the layers in ``paged``, each with its rotation.

    Raises:
        Refused: a layer's keys or values depend on the position in another way.
    """
    count, longest = _PROBE_TOKENS, int(config.model_config.max_model_len)
    offset = min(_PROBE_SHIFT, longest - count - 1)
    blocks = np.arange(1, 2 + count // paged.block_size, dtype=np.int32)  # block 0 is the null block
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, config.model_config.get_vocab_size(), (count,), generator=generator)
    row = Row(tokens.to(torch.int32).numpy(), blocks, 0, count)
    try:
        forward.run([row])
        before = [paged.read(layer, blocks, count) for layer in layers]
        forward.run([row], position_offset=offset)
    except Exception as error:  # of a model's own code, in whatever way it is unlike others
        raise Refused(f"a forward of our own does not run with it: {error!r}") from error
    here = torch.arange(count, device=paged.device)
    rotations = Rotations(forward.model, longest)
    found = []
    for layer, (keys, values) in zip(layers, before, strict=True):
        moved_keys, moved_values = paged.read(layer, blocks, count)
        try:
            possible = rotations.of(layer.name)
        except NoShift as reason:
            raise Refused(str(reason)) from reason
        errors: dict[float, Rotary | None] = {}
        for rotary in possible:
            turned = keys if rotary is None else rotate(keys, *shift(rotary, here, here + offset), rotary.interleaved)
            errors[_relative(moved_keys, turned)] = rotary
        _expect_small("keys", layer, min(errors), paged.dtype)
        _expect_small("values", layer, _relative(moved_values, values), paged.dtype)
        found.append(replace(layer, rotary=errors[min(errors)]))
    paged.layers = found


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-6))


def _expect_small(what: str, layer: AttentionLayer, error: float, dtype: torch.dtype) -> None:
    # What bfloat16 loses over a deep model's layers stays below a tenth; a wrong rotation is of order one.
    tolerance = 0.01 if dtype == torch.float32 else 0.1
    if not error < tolerance:
        raise Refused(
            f"the {what} of layer {layer.name} don't move with the position as its rotary embedding "
            f"says (relative error {error:.2g})"
        )


__all__ = ["Refused", "check_shift", "refuse_options", "survey_layers"]
