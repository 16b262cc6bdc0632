import os
import random

import pytest
import torch
from safetensors import safe_open

from kvblend_rag.errors import ChunkDamaged, ChunkMissing, StoreError
from kvblend_rag.store.base import StoredChunk
from kvblend_rag.store.chunk_file import encode_chunk, read_chunk, write_chunk
from kvblend_rag.store.layout import StoreLayout

SHARD = (0, 1)


@pytest.fixture
def layout(root):
    layout = StoreLayout(root)
    layout.create()
    return layout


def write(layout, chunk, shard=SHARD):
    path = layout.chunk_path(chunk.key, shard)
    write_chunk(layout, path, encode_chunk(layout, chunk, shard))
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_every_dtype_comes_back_bit_for_bit(layout, make, same, dtype):
    chunk = make(1, tokens=7, dtype=dtype)
    path = write(layout, chunk)
    same(read_chunk(layout, path, chunk.key, SHARD), chunk)


def test_a_slice_of_a_larger_tensor_is_written_as_it_looks(layout, make, same):
    whole = make(1, tokens=16)
    part = StoredChunk(whole.key, whole.namespace, whole.token_ids[4:12], whole.kv[:, :, 4:12])
    same(read_chunk(layout, write(layout, part), part.key, SHARD), part)


def test_the_file_is_plain_safetensors(layout, make):
    chunk = make(1, dtype=torch.bfloat16)
    with safe_open(write(layout, chunk), "pt") as file:
        assert torch.equal(file.get_tensor("kv"), chunk.kv)
        assert file.get_tensor("token_ids").tolist() == chunk.token_ids.tolist()
        assert file.metadata()["key"] == chunk.key


def test_a_flip_of_any_bit_is_noticed(layout, make):
    chunk = make(1, tokens=1)
    path = write(layout, chunk)
    whole = path.read_bytes()
    rng = random.Random(1)
    for position in range(len(whole)):
        broken = bytearray(whole)
        broken[position] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        with pytest.raises(ChunkDamaged):
            read_chunk(layout, path, chunk.key, SHARD)
    path.write_bytes(whole)
    assert torch.equal(read_chunk(layout, path, chunk.key, SHARD).kv, chunk.kv)


def test_every_truncation_is_noticed(layout, make):
    chunk = make(1, tokens=1)
    path = write(layout, chunk)
    for size in reversed(range(path.stat().st_size)):
        os.truncate(path, size)
        with pytest.raises(ChunkDamaged):
            read_chunk(layout, path, chunk.key, SHARD)


@pytest.mark.parametrize("junk", [b"\0", b"x" * 64, b"\0" * 4096])
def test_bytes_too_many_are_noticed(layout, make, junk):
    chunk = make(1)
    path = write(layout, chunk)
    path.write_bytes(path.read_bytes() + junk)
    with pytest.raises(ChunkDamaged):
        read_chunk(layout, path, chunk.key, SHARD)


@pytest.mark.parametrize("seed", range(20))
def test_overwritten_and_random_regions_are_noticed(layout, make, seed):
    chunk = make(1, tokens=64)
    path = write(layout, chunk)
    rng = random.Random(seed)
    whole = bytearray(path.read_bytes())
    start, length = rng.randrange(len(whole)), rng.randrange(1, 512)
    whole[start : start + length] = rng.choice([bytes(length), rng.randbytes(length), b"[" * length])
    path.write_bytes(whole)
    with pytest.raises(ChunkDamaged):
        read_chunk(layout, path, chunk.key, SHARD)


def test_foreign_contents_are_damage(layout, make):
    path = layout.chunk_path(make(1).key, SHARD)
    path.parent.mkdir()
    for contents in (b"", b"hello", b"{}" * 5000, os.urandom(4096), b"\xff" * 100, b"[" * 100_000):
        path.write_bytes(contents)
        with pytest.raises(ChunkDamaged):
            read_chunk(layout, path, make(1).key, SHARD)


def test_another_chunk_or_rank_under_this_name_is_noticed(layout, make):
    mine, other = make(1), make(2)
    path, foreign = write(layout, mine), write(layout, other)
    os.replace(foreign, path)
    with pytest.raises(ChunkDamaged, match=other.key):
        read_chunk(layout, path, mine.key, SHARD)
    of_rank_1 = write(layout, make(3, rank=1), (1, 2))
    os.replace(of_rank_1, layout.chunk_path(make(3).key, (0, 2)))
    with pytest.raises(ChunkDamaged, match="1of2"):
        read_chunk(layout, layout.chunk_path(make(3).key, (0, 2)), make(3).key, (0, 2))


def test_another_format_is_not_guessed_at(layout, make):
    chunk = make(1)
    path = write(StoreLayout(layout.root, version=2), chunk)
    with pytest.raises(ChunkDamaged, match="format 2"):
        read_chunk(layout, path, chunk.key, SHARD)


def test_no_file_is_missing(layout, make):
    with pytest.raises(ChunkMissing, match=make(1).key):
        read_chunk(layout, layout.chunk_path(make(1).key, SHARD), make(1).key, SHARD)


@pytest.mark.parametrize(
    "key", ["", "../../etc/passwd", "A" * 32, "a" * 31, "a" * 33, "a" * 32 + "\n", "ab/" + "a" * 29]
)
def test_a_key_can_not_lead_elsewhere(layout, key):
    with pytest.raises(StoreError, match="32"):
        layout.chunk_path(key, SHARD)


def test_what_is_no_chunk_is_not_written(layout, make):
    chunk = make(1)
    for kv in (chunk.kv.double(), chunk.kv[0], chunk.kv[:, :1], chunk.kv[:, :, 1:]):
        with pytest.raises(StoreError):
            encode_chunk(layout, StoredChunk(chunk.key, chunk.namespace, chunk.token_ids, kv), SHARD)


def test_the_contents_are_durable_before_the_name_and_the_name_before_the_return(layout, make, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor):
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def spy_replace(source, target):
        events.append(("rename", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    path = write(layout, make(1))
    assert events[0] == ("sync", str(path.parent.parent))
    assert events[1][0] == "sync"
    assert events[1][1].endswith(".tmp")
    assert events[2:] == [("rename", str(path)), ("sync", str(path.parent))]
