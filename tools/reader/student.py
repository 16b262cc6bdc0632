"""The adapter that is taught, over the frozen base model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tools.reader.llama import PROJECTIONS, Llama


class Student:
    """Its factors with gradients, the weights that they change, and a model that takes both merged."""

    def __init__(self, base: Path, adapter: Path, device: str) -> None:
        """Args: folders of the base model and of the adapter to go on from."""
        self.device = device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.settings = json.loads((adapter / "adapter.json").read_text(encoding="utf-8"))
        self._scale = self.settings["alpha"] / self.settings["rank"]
        loaded = load_file(base / "model.safetensors")
        self.factors = {
            name: tensor.to(device, torch.float32).requires_grad_()
            for name, tensor in load_file(adapter / "adapter.safetensors").items()
        }
        layers = sorted({name.rsplit(".", 1)[0] for name in self.factors})
        self._frozen = {f"{name}.weight": loaded[f"{name}.weight"].to(device, torch.float32) for name in layers}
        weights = {name: tensor.to(device, self.dtype) for name, tensor in loaded.items() if name not in self._frozen}
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        assert len(layers) == len(PROJECTIONS) * config["num_hidden_layers"], "the adapter changes every projection"
        self.llama = Llama(config, weights)

    def projections(self) -> dict[str, torch.Tensor]:
        """The merged weights, as the prepared reader will hold them."""
        merged = {}
        for name, weight in self._frozen.items():
            layer = name.removesuffix(".weight")
            change = self.factors[f"{layer}.lora_B"] @ self.factors[f"{layer}.lora_A"]
            merged[name] = (weight + self._scale * change).to(self.dtype)
        return merged

    def save(self, folder: Path, **about: Any) -> None:
        """Write the adapter as the package holds it."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.detach().to(torch.bfloat16).cpu().contiguous() for name, tensor in self.factors.items()},
            folder / "adapter.safetensors",
        )
        text = json.dumps({**self.settings, **about}, indent=1)
        (folder / "adapter.json").write_text(text, encoding="utf-8")
