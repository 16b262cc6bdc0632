"""Start vLLM with our connector: the arguments, sensible defaults on a CPU, and errors in one sentence."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM

from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import ConfigError, EngineUnavailable, ModelNotFound
from kvblend_rag.vllm_plugin import compat
from kvblend_rag.vllm_plugin.forced_tokens import PROCESSOR

logger = logging.getLogger(__name__)

CONNECTOR = "KVBlendConnector"
CONNECTOR_MODULE = "kvblend_rag.vllm_plugin.connector"
HYBRID_CONNECTOR = "HybridConnector"
HYBRID_CONNECTOR_MODULE = "kvblend_rag.vllm_plugin.hybrid_connector"
WORKER_CLASS = "kvblend_rag.vllm_plugin.worker_cls.KVBlendWorker"

# vLLM takes nine tenths of a CPU machine's memory unless told otherwise.
_CPU_MEMORY_SHARE = 0.4

_GRAPH_TOKENS = 1024
"""Tokens up to which CUDA graphs are captured, vLLM's own default being 512 at most: recomputing a tenth of an 8k
prompt fits then, and starting takes two seconds more."""


def connector_arguments(config: BlendConfig) -> dict[str, Any]:
    """The arguments that add kvblend to any vLLM engine: ``vllm.LLM(model, **connector_arguments(config))``."""
    return {"kv_transfer_config": KVTransferConfig(**transfer_settings(config)), "worker_cls": WORKER_CLASS}


def transfer_settings(config: BlendConfig) -> dict[str, Any]:
    """What ``--kv-transfer-config`` holds, as JSON."""
    return {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_role": "kv_both",
        "kv_connector_extra_config": config.connector_settings(),
    }


def start(model: str, config: BlendConfig, **options: Any) -> AsyncLLM:
    """A vLLM engine with the connector; call it inside the loop that the engine is to live in.

    How many tokens a step computes, and how many requests run at once, is what ``vllm serve`` has by default: a bare
    ``AsyncLLM`` has a quarter of it on a large GPU.

    Args:
        model: folder or hub name.
        config: of store and blending.
        options: any of vLLM's engine arguments.

    Raises:
        ModelNotFound: no such folder.
        ConfigError: an argument that vLLM doesn't know.
        EngineUnavailable: vLLM is of an unsupported version or did not start.
    """
    unsupported = compat.unsupported_version()
    if unsupported is not None:
        raise EngineUnavailable(unsupported)
    check_model(model)
    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise ConfigError(f"vLLM {compat.version()} has no engine argument {unknown[0]!r}.")
    if PROCESSOR in (options.get("logits_processors") or ()):
        compat.keep_first_runner()
    arguments = {"model": model, **platform_defaults(options), **options, **connector_arguments(config)}
    try:
        with _main_module_hidden():
            made = AsyncEngineArgs(**arguments)
            fit_connector(made)
            return AsyncLLM.from_engine_args(made, usage_context=UsageContext.OPENAI_API_SERVER)
    except Exception as error:
        raise EngineUnavailable(f"vLLM did not start with {model}: {root_cause(error)}") from error


def fit_connector(arguments: AsyncEngineArgs) -> None:
    """Let a model that can't be blended have the connector that it can start with, or none."""
    transfer = arguments.kv_transfer_config
    if transfer is None or transfer.kv_connector != CONNECTOR:
        return
    model = arguments.create_model_config()
    if model.is_encoder_decoder:  # vLLM takes no connector there (vllm/v1/core/sched/scheduler.py)
        logger.warning("kvblend: every request gets an ordinary prefill: it is an encoder-decoder model.")
        arguments.kv_transfer_config = None
    elif model.is_hybrid:
        transfer.kv_connector = HYBRID_CONNECTOR
        transfer.kv_connector_module_path = HYBRID_CONNECTOR_MODULE


def platform_defaults(options: dict[str, Any]) -> dict[str, Any]:
    """Engine arguments that suit this machine, beside those given."""
    defaults: dict[str, Any] = {"disable_log_stats": False}  # the times come from its statistics
    if current_platform.is_cpu():
        memory = {"gpu_memory_utilization", "kv_cache_memory_bytes"}
        if not memory & options.keys() and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            defaults["gpu_memory_utilization"] = _CPU_MEMORY_SHARE
        if not _fast_bfloat16():
            # There a bfloat16 matmul is a naive loop on one thread, ten times slower than float32.
            defaults["dtype"] = "float32"
    elif not options.get("enforce_eager") and "compilation_config" not in options:
        defaults["compilation_config"] = {"max_cudagraph_capture_size": _GRAPH_TOKENS}
    return defaults


def _fast_bfloat16() -> bool:
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks if check is not None)


def check_model(model: str) -> None:
    """Raise if a model's name can be nothing that exists.

    Raises:
        ConfigError: no model is named.
        ModelNotFound: there is no such folder, or it holds no model.
    """
    if not model:
        raise ConfigError("No model is named: pass model='FOLDER or hub name'.")
    path = Path(model).expanduser()
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_like_path and not path.exists():
        raise ModelNotFound(f"There is no model at {model}: give a folder that exists, or a hub name.")
    if path.is_dir() and not (path / "config.json").exists() and not any(path.glob("*.gguf")):
        raise ModelNotFound(f"The folder {model} holds no model: a config.json is missing.")


@contextmanager
def _main_module_hidden() -> Iterator[None]:
    """Keep spawned processes from importing the user's script again.

    With the spawn start method, Python runs the main module in each child; a script without an
    ``if __name__ == "__main__"`` guard would then start engines without end.
    """
    main = sys.modules["__main__"]
    hidden = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
    main.__dict__.pop("__file__", None)
    main.__spec__ = None
    try:
        yield
    finally:
        for name, value in hidden.items():
            setattr(main, name, value)


def root_cause(error: BaseException) -> str:
    """The first line of what went wrong first."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


__all__ = [
    "CONNECTOR",
    "CONNECTOR_MODULE",
    "HYBRID_CONNECTOR",
    "HYBRID_CONNECTOR_MODULE",
    "WORKER_CLASS",
    "check_model",
    "connector_arguments",
    "fit_connector",
    "platform_defaults",
    "root_cause",
    "start",
    "transfer_settings",
]
