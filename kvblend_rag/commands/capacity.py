"""What KV takes, what keeping it costs, and from which bandwidth on loading it beats computing it.

With ``b`` bytes of KV a token, a prefill rate of ``R`` tokens/s, a tier that delivers ``B`` bytes/s, and a share ``r``
of the reused tokens recomputed::

    b         = layers · 2 · KV heads · head dimension · bytes a value
    speed-up  = (1/R) / (b/B + r/R)          of the reused tokens, loading not overlapped
    B*        = b · R / (1 − r)              where the speed-up is 1: below, a prefill is sooner
    uses      = store / (prefill · (1 − r))  a month, from which on keeping is cheaper than computing
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvblend_rag.errors import ConfigError


@dataclass(frozen=True)
class ModelShape:
    """What the KV of a model depends on, as its published ``config.json`` says, and its size."""

    layers: int
    kv_heads: int
    head_dim: int
    parameters: float
    """In billions, as published; 0: unknown."""

    def bytes_per_token(self, bytes_per_value: float = 2.0) -> int:
        """Bytes of KV a token; 2 bytes a value are bfloat16 or float16."""
        return int(self.layers * 2 * self.kv_heads * self.head_dim * bytes_per_value)

    def prefill_rate(self, teraflops: float) -> float:
        """Tokens a second of a machine that gets so much done: a token takes 2 operations a parameter.

        Raises:
            ConfigError: the size of the model is unknown.
        """
        if not self.parameters:
            raise ConfigError("A config.json does not say how fast the model prefills: give --prefill-rate.")
        return teraflops * 1e12 / (2 * self.parameters * 1e9)


MODELS = {
    "SmolLM2-135M (the bundled reader)": ModelShape(30, 3, 64, 0.135),
    "Qwen2.5-0.5B": ModelShape(24, 2, 64, 0.49),
    "Llama-3.2-3B": ModelShape(28, 8, 128, 3.21),
    "Qwen2.5-7B": ModelShape(28, 4, 128, 7.62),
    "Mistral-7B-v0.3": ModelShape(32, 8, 128, 7.25),
    "Llama-3.1-8B": ModelShape(32, 8, 128, 8.03),
    "Qwen3-8B": ModelShape(36, 8, 128, 8.19),
    "Phi-4": ModelShape(40, 10, 128, 14.7),
    "Qwen3-14B": ModelShape(40, 8, 128, 14.8),
    "Qwen2.5-32B": ModelShape(64, 8, 128, 32.8),
    "Llama-3.1-70B": ModelShape(80, 8, 128, 70.6),
}


@dataclass(frozen=True)
class Tier:
    """A place for KV."""

    dollars: float
    """A GB (10⁹ bytes) and month."""
    gigabytes_per_second: float
    """What reaches the device's memory."""


TERAFLOPS = 400.0
"""What an H100 gets done in a prefill: 334 to 642 in ``docs/results/gpu-ttft-*.json``, by model and length."""

TIERS = {"memory": Tier(3.0, 50.0), "disk": Tier(0.1, 5.0), "valkey": Tier(8.0, 2.5), "s3": Tier(0.023, 1.0)}
"""Round figures to begin with, neither quotes nor measurements: give your own."""


@dataclass(frozen=True)
class Plan:
    """The numbers that a plan is made from."""

    shape: ModelShape
    prefill_rate: float
    """Tokens a second, of plain vLLM on this machine."""
    tokens: float = 1e6
    """In all documents."""
    bytes_per_value: float = 2.0
    ratio: float = 0.15
    """Share of the reused tokens that is recomputed."""
    machine_hour: float = 3.0
    """Dollars an hour of the machine that prefills."""

    def token_bytes(self) -> int:
        """Bytes of KV a token."""
        return self.shape.bytes_per_token(self.bytes_per_value)

    def break_even(self) -> float:
        """GB/s at which loading, with the recomputed share, takes as long as a prefill."""
        return self.token_bytes() * self.prefill_rate / (1 - self.ratio) / 1e9

    def prefill_dollars(self) -> float:
        """What prefilling a million tokens costs."""
        return 1e6 / self.prefill_rate / 3600 * self.machine_hour

    def tier(self, tier: Tier) -> dict[str, float]:
        """What one tier costs and gives: ``dollars_a_million`` and ``dollars`` a month, ``speedup`` of reused tokens,
        ``uses`` a month."""
        a_million = self.token_bytes() * 1e6 / 1e9 * tier.dollars
        loading = self.token_bytes() / (tier.gigabytes_per_second * 1e9)
        prefill = 1 / self.prefill_rate
        return {
            "dollars_a_million": a_million,
            "dollars": a_million * self.tokens / 1e6,
            "speedup": prefill / (loading + self.ratio * prefill),
            "uses": a_million / (self.prefill_dollars() * (1 - self.ratio)),
        }


def find_shape(name: str) -> ModelShape:
    """A known model by its name, or the model in a folder by its ``config.json``.

    Raises:
        ConfigError: neither, or a configuration without the sizes of its KV.
    """
    known = {each.lower(): shape for each, shape in MODELS.items()}
    if name.lower() in known:
        return known[name.lower()]
    path = Path(name) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{name!r} is no folder with a config.json, and not among {', '.join(MODELS)}.")
    try:
        return read_shape(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(f"{path} does not say how large the model's KV is: {error!r}.") from error


def read_shape(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a model's ``config.json`` gives; its size is not in there."""
    heads = int(config["num_attention_heads"])
    return ModelShape(
        layers=int(config["num_hidden_layers"]),
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
        parameters=0.0,
    )


def with_prices(prices: Mapping[str, float], bandwidths: Mapping[str, float]) -> dict[str, Tier]:
    """The tiers with the user's own prices and bandwidths.

    Raises:
        ConfigError: there is no such tier, or a number that is not above 0.
    """
    tiers = dict(TIERS)
    for field, given in (("dollars", prices), ("gigabytes_per_second", bandwidths)):
        for name, value in given.items():
            if name not in tiers:
                raise ConfigError(f"There is no tier {name!r}: known are {', '.join(tiers)}.")
            if not 0 < value < 1e9:
                raise ConfigError(f"{name}={value:g} can't be used: give a number above 0.")
            tiers[name] = dataclasses.replace(tiers[name], **{field: value})
    return tiers


__all__ = ["MODELS", "TERAFLOPS", "TIERS", "ModelShape", "Plan", "Tier", "find_shape", "read_shape", "with_prices"]
