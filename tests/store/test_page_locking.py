"""What the user set for PyTorch's allocators is kept, and wins; what it does not take ends no engine's start."""

import pytest
import torch

from kvblend_rag.store.page_locking import allocator_settings, give_back, lock_pages_by_threads, locked_bytes


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


@pytest.mark.parametrize(("nbytes", "taken"), [(0, 0), (1, 1), (3, 4), (130 << 20, 256 << 20), (128 << 20, 128 << 20)])
def test_blocks_are_powers_of_two(nbytes, taken):
    assert locked_bytes(nbytes) == taken


@pytest.mark.parametrize(("allocated", "active", "given_back"), [(10, 8, 0), (10, 6, 1)])
def test_free_memory_beyond_the_bound_is_given_back(monkeypatch, allocated, active, given_back):
    asked = []
    counts = {"allocated_bytes.current": allocated, "active_bytes.current": active}
    monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: counts)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: asked.append(True), raising=False)
    give_back(3)
    assert len(asked) == given_back


def test_without_a_device_there_is_none():
    give_back(0)
