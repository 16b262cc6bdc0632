"""What the user set for PyTorch's allocators is kept, and wins; what it does not take ends no engine's start."""

import torch

from kvblend_rag.vllm_plugin.worker.page_locking import allocator_settings, lock_pages_by_threads


def test_the_users_settings_come_last(monkeypatch):
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    ours = allocator_settings()
    assert "pinned_num_register_threads" in ours
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "pinned_num_register_threads:2")
    assert allocator_settings() == f"{ours},max_split_size_mb:64,pinned_num_register_threads:2"


def test_settings_that_pytorch_does_not_take_are_a_warning(monkeypatch, caplog):
    asked = []

    def refuse(settings):
        asked.append(settings)
        raise ValueError("unknown key")

    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", refuse, raising=False)
    lock_pages_by_threads()
    assert asked == [allocator_settings()]
    assert "PyTorch's own, slower way: unknown key" in caplog.text
