"""What enters the device's memory and what leaves it; the copies themselves are tried by tests/gpu/exactness.py."""

import pytest

pytest.importorskip("vllm")

import torch

from kvblend_rag.store.encoded import encoded
from kvblend_rag.vllm_plugin.worker.hot_chunks import HotChunks

CPU = torch.device("cpu")


def chunk(value: float, tokens: int = 4) -> torch.Tensor:
    return torch.full((2, 2, tokens, 1, 8), value)


SIZE = chunk(0.0).nbytes


def asked(hot: HotChunks, *names: str) -> list[str]:
    """Ask for chunks as a request does; which of them were there."""
    found = hot.take(names)
    hot.offer({name: chunk(float(ord(name))) for name in names if name not in found})
    return list(found)


def test_a_chunk_enters_when_it_is_asked_for_again():
    hot = HotChunks(4 * SIZE, CPU)
    assert asked(hot, "a", "b") == []
    assert asked(hot, "a") == []
    assert asked(hot, "a", "b") == ["a"]
    assert torch.equal(hot.take(["a"])["a"], chunk(float(ord("a"))))
    assert hot.nbytes == 2 * SIZE


def test_what_is_read_once_pushes_nothing_out():
    hot = HotChunks(2 * SIZE, CPU)
    for _ in range(2):
        asked(hot, "a", "b")
    for name in "cdefgh":
        asked(hot, name)
    assert asked(hot, "a", "b") == ["a", "b"]


def test_the_least_recently_used_leave_first_and_the_bound_holds():
    hot = HotChunks(2 * SIZE, CPU)
    for name in "aabb":
        asked(hot, name)
    asked(hot, "a")
    for name in "cc":
        asked(hot, name)
    assert hot.nbytes == 2 * SIZE
    assert sorted(hot.take("abc")) == ["a", "c"]


def test_it_keeps_a_copy_of_its_own():
    hot = HotChunks(4 * SIZE, CPU)
    kv = chunk(1.0)
    for _ in range(2):
        hot.offer({"a": kv})
    kv.zero_()
    assert torch.equal(hot.take(["a"])["a"], chunk(1.0))


def test_a_deleted_chunk_is_gone_and_must_be_asked_for_twice_again():
    hot = HotChunks(4 * SIZE, CPU)
    for _ in range(2):
        asked(hot, "a")
    hot.forget(["a", "never there"])
    assert hot.nbytes == 0
    assert asked(hot, "a") == []
    assert asked(hot, "a") == []
    assert asked(hot, "a") == ["a"]


def test_a_chunk_beyond_the_bound_is_never_held():
    hot = HotChunks(SIZE, CPU)
    big = chunk(1.0, tokens=8)
    for _ in range(3):
        hot.offer({"big": big})
    assert hot.take(["big"]) == {}
    assert hot.nbytes == 0


def test_without_room_nothing_is_held():
    hot = HotChunks(0, CPU)
    for _ in range(3):
        assert asked(hot, "a") == []


@pytest.mark.parametrize("encoding", ["int8", "fp8", "int4"])
def test_an_encoded_chunk_is_held_encoded(encoding):
    kv = encoded(torch.randn(2, 2, 40, 1, 8), encoding)
    wanted = kv.decode()
    hot = HotChunks(kv.nbytes, CPU)
    for _ in range(2):
        hot.offer({"a": kv})
    kv.buffer.zero_()
    assert hot.nbytes == kv.nbytes
    assert hot.take(["a"])["a"].encoding == encoding
    assert torch.equal(hot.take(["a"])["a"].decode(), wanted)
    hot.forget(["a"])
    assert hot.nbytes == 0
