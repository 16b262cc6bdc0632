"""What the user set for PyTorch's allocators is kept, and wins; what it does not take ends no engine's start."""

import pytest
import torch

from kvblend_rag.store.page_locking import Spare, allocator_settings, lock_pages_by_threads, locked_bytes


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


def test_free_memory_beyond_the_bound_is_given_back(monkeypatch):
    """Counted by what was page-locked at all, since others' share is told by nobody."""
    taken, emptied = {}, []

    def empty():
        emptied.append(True)
        taken["allocated_bytes.current"] -= 5

    monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: taken)
    monkeypatch.setattr(torch._C, "_host_emptyCache", empty, raising=False)
    spare = Spare(4)
    calls = []
    for allocated, ours in ((30, 10), (34, 10), (35, 10), (30, 10), (34, 10), (18, 10), (23, 10)):
        taken["allocated_bytes.current"] = allocated
        spare.bound(ours)
        calls.append(len(emptied))
    # 20 are others'; of 25 beside us 5 are free; later others take 8 alone, and of 13 there are 5 free again
    assert calls == [0, 0, 1, 1, 1, 1, 2]
