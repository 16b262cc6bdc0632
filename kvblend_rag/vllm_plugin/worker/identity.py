"""Which model this is: a digest of everything about it that a chunk's KV depends on."""

from __future__ import annotations

import json
from pathlib import Path

from blake3 import blake3
from vllm.config import VllmConfig

from kvblend_rag.blend.chunk import of_ranks

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
_TOKENIZER = ("tokenizer*", "vocab*", "merges*", "*.model", "*tekken*")


def fingerprint(vllm_config: VllmConfig) -> str:
    """Digest of weights, architecture, rotary parameters, dtypes and tokenizer; and the ranks that share the heads.

    The weights are hashed as they lie on disk: once loaded, vLLM may have repacked them out of reach.

    Raises:
        ValueError: the weights are not files that can be found on this machine.
    """
    return of_ranks(_digest(vllm_config), int(vllm_config.parallel_config.tensor_parallel_size))


def _digest(vllm_config: VllmConfig) -> str:
    model, cache = vllm_config.model_config, vllm_config.cache_config
    architecture = model.hf_config.to_dict()
    # LongRoPE picks one of its two sets of frequencies by the context's length; nothing else depends on that.
    by_length = any(name in str(architecture) for name in ("longrope", "'su'"))
    digest = blake3(
        json.dumps(
            {
                "config": architecture,
                "dtype": str(model.dtype),
                "cache_dtype": str(cache.cache_dtype),
                "quantization": str(model.quantization),
                "max_model_len": model.max_model_len if by_length else None,
            },
            sort_keys=True,
            default=str,
        ).encode()
    )
    if str(vllm_config.load_config.load_format) == "dummy":
        digest.update(f"dummy weights, seed {model.seed}".encode())
        return digest.hexdigest()
    folder = _local_folder(model.model, model.revision)
    files = [folder] if folder.is_file() else _files(folder, _WEIGHTS)
    if not files:
        raise ValueError(f"no weight files lie in {folder}, so chunks could not be told from another model's")
    tokenizer = _local_folder(model.tokenizer, model.tokenizer_revision)
    for path in [*files, *(_files(tokenizer, _TOKENIZER) if tokenizer.is_dir() else ())]:
        digest.update(path.name.encode())
        digest.update(_file_digest(path).encode())
    return digest.hexdigest()


def _files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _file_digest(path: Path) -> str:
    # A hub cache names its blobs by their SHA-256.
    if path.is_symlink() and len(path.resolve().name) == 64:
        return path.resolve().name
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


def _local_folder(model: str, revision: str | None) -> Path:
    if Path(model).exists():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except Exception as error:
        raise ValueError(f"the files of {model} can't be found on this machine") from error


__all__ = ["fingerprint"]
