"""A small Llama with random weights whose attention matters: what it answers depends on every token of a prompt.

vLLM's own dummy weights are near zero, and so are the differences between what such a model answers. Every id is a
word of its tokenizer, so that a server has something to decode.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from kvblend_rag.commands.word_tokenizer import write_word_tokenizer

VOCABULARY = 4096
_SCALE = 0.06
"""Three times as large as usual, so that attention is not flat."""


def write_random_model(folder: Path, *, layers: int = 4, hidden: int = 128, seed: int = 0) -> Path:
    """Write configuration, weights and tokenizer.

    Args:
        folder: created when missing.
        layers: attention layers.
        hidden: width; heads are of 32 dimensions, two query heads to a key head.
        seed: of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    heads, kv_width = hidden // 32, hidden // 2
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": 32,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return _SCALE * torch.randn(rows, columns, generator=generator)

    def norm() -> torch.Tensor:
        return 1 + 0.3 * torch.randn(hidden, generator=generator)

    weights = {"model.embed_tokens.weight": matrix(VOCABULARY, hidden), "model.norm.weight": norm()}
    for layer in range(layers):
        name = f"model.layers.{layer}"
        weights |= {
            f"{name}.input_layernorm.weight": norm(),
            f"{name}.post_attention_layernorm.weight": norm(),
            f"{name}.self_attn.q_proj.weight": matrix(hidden, hidden),
            f"{name}.self_attn.k_proj.weight": matrix(kv_width, hidden),
            f"{name}.self_attn.v_proj.weight": matrix(kv_width, hidden),
            f"{name}.self_attn.o_proj.weight": matrix(hidden, hidden),
            f"{name}.mlp.gate_proj.weight": matrix(2 * hidden, hidden),
            f"{name}.mlp.up_proj.weight": matrix(2 * hidden, hidden),
            f"{name}.mlp.down_proj.weight": matrix(hidden, 2 * hidden),
        }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_word_tokenizer(folder, VOCABULARY)
    return folder


__all__ = ["VOCABULARY", "write_random_model"]
