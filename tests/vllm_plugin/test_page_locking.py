"""What the user set for PyTorch's allocators is kept, and wins."""

from kvblend_rag.vllm_plugin.worker.page_locking import allocator_settings


def test_the_users_settings_come_last(monkeypatch):
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    ours = allocator_settings()
    assert "pinned_num_register_threads" in ours
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "pinned_num_register_threads:2")
    assert allocator_settings() == f"{ours},max_split_size_mb:64,pinned_num_register_threads:2"
