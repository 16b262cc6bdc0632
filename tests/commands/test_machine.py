"""What a measurement was made on."""

import os
import stat

import pytest

from kvblend_rag.commands import bench_gpu
from kvblend_rag.commands.machine import has_gpu


def test_a_gpu_is_asked_for_without_starting_cuda(monkeypatch):
    """Else the engine that is forked from here could not use it."""
    pytest.importorskip("torch")
    monkeypatch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK", raising=False)
    has_gpu()
    assert os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"


def test_clocks_as_the_driver_tells_them(monkeypatch, tmp_path):
    told = tmp_path / "nvidia-smi"
    told.write_text("#!/bin/sh\necho '1980, 2619, 1980, 2619, 700.00, 580.159.04'\n")
    told.chmod(told.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    clocks = bench_gpu._clocks()
    assert (clocks["clocks.sm"], clocks["power.limit"], clocks["driver_version"]) == ("1980", "700.00", "580.159.04")
    told.write_text("#!/bin/sh\nexit 9\n")
    assert bench_gpu._clocks() == {}
