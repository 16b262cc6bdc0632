"""What a worker reads of the store for one request, without an engine."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from kvblend_rag.commands.torture_kill import make
from kvblend_rag.store import DiskStore, MemoryStore, StoreLayout, TieredStore
from kvblend_rag.vllm_plugin.worker.blender import Blender
from kvblend_rag.vllm_plugin.worker.hot_chunks import HotChunks
from kvblend_rag.vllm_plugin.worker.paged_kv import PagedKV


@pytest.fixture
def blender(tmp_path):
    """A blender with nothing but a store of chunks 1 and 2, and the shape that its cache has."""
    store = TieredStore([MemoryStore(1 << 30), DiskStore(tmp_path)])
    for number in (1, 2):
        store.put(make(number))
    blender = Blender.__new__(Blender)
    blender._store, blender._hot = store, HotChunks(0, torch.device("cpu"))
    blender._paged = paged = PagedKV.__new__(PagedKV)
    paged.layers, paged.heads, paged.head_dim, paged.dtype = [0, 1], 2, 4, torch.float32
    return blender


def job(*runs):
    named = [SimpleNamespace(key=make(number).key, chunk_start=start, length=length) for number, start, length in runs]
    return SimpleNamespace(plan=SimpleNamespace(runs=named))


def test_each_chunk_is_read_once_with_its_tier(blender):
    loads = []
    chunks, tiers, failure = blender._read_all(job((1, 0, 20), (2, 5, 59), (1, 10, 54)), loads)
    assert failure is None
    assert {load.tier for load in loads} == {"memory"}
    assert (sum(load.chunks for load in loads), sum(load.bytes for load in loads)) == (2, 2 * make(1).kv.nbytes)
    assert tiers == {make(number).key: "memory" for number in (1, 2)}
    assert all(torch.equal(chunks[make(number).key], make(number).kv) for number in (1, 2))


@pytest.mark.parametrize(
    ("runs", "says"), [([(1, 0, 65)], "this model needs"), ([(1, 0, 5), (3, 0, 5)], "ingest its text again")]
)
def test_what_can_not_be_used_is_a_reason(blender, runs, says):
    chunks, tiers, failure = blender._read_all(job(*runs), [])
    assert (chunks, tiers) == ({}, {})
    assert says in failure


@pytest.mark.parametrize("encoding", ["int8", "fp8", "int4"])
def test_encoded_chunks_are_held_to_the_same(blender, tmp_path, encoding):
    """A GPU's worker reads them as they lie; of another shape or dtype, they are refused all the same."""
    blender._store = TieredStore([DiskStore(StoreLayout(tmp_path / "b", encoding=encoding, decoding=False))])
    blender._store.put(make(1))
    chunks, _, failure = blender._read_all(job((1, 5, 59)), [])
    assert failure is None
    assert chunks[make(1).key].encoding == encoding
    for changed in ({"layers": [0]}, {"heads": 4}, {"head_dim": 8}, {"dtype": torch.bfloat16}):
        was = {name: getattr(blender._paged, name) for name in changed}
        vars(blender._paged).update(changed)
        assert "this model needs" in blender._read_all(job((1, 5, 59)), [])[2]
        vars(blender._paged).update(was)
    assert "this model needs" in blender._read_all(job((1, 0, 65)), [])[2]
