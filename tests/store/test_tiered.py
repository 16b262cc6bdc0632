import subprocess
import sys

import pytest
import torch

from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import ChunkDamaged, ChunkMissing, StoreError, StoreFull
from kvblend_rag.store import (
    DiskStore,
    MemoryStore,
    StoreLayout,
    TieredStore,
    open_catalogue,
    open_store,
)

BIG = 1 << 30


@pytest.fixture
def tiers(root):
    return MemoryStore(BIG), DiskStore(root)


def test_put_writes_through_and_get_takes_the_fastest(tiers, make):
    memory, disk = tiers
    store = TieredStore(tiers)
    assert store.locate(make(1).key) is None
    store.put(make(1))
    assert memory.contains(make(1).key)
    assert disk.contains(make(1).key)
    kv, tier = store.get_with_tier(make(1).key)
    assert tier == "memory"
    assert torch.equal(kv, make(1).kv)


def test_get_promotes(tiers, make):
    tiers[1].put(make(1))
    store = TieredStore(tiers)
    assert store.locate(make(1).key) == "disk"
    assert store.get_with_tier(make(1).key)[1] == "disk"
    assert store.locate(make(1).key) == "memory"
    assert store.get_with_tier(make(1).key)[1] == "memory"


def test_prefetch(tiers, make):
    memory, disk = tiers
    for number in (1, 2):
        disk.put(make(number))
    store = TieredStore(tiers)
    assert store.prefetch([make(number).key for number in (1, 2, 3)]) == 2
    assert memory.contains(make(1).key)
    assert TieredStore([disk]).prefetch([make(1).key]) == 1


def test_nothing_stays_in_memory_that_is_not_durable(tiers, make, monkeypatch):
    memory, disk = tiers

    def full(chunk):
        raise StoreFull("full")

    monkeypatch.setattr(disk, "put", full)
    with pytest.raises(StoreFull):
        TieredStore(tiers).put(make(1))
    assert not memory.contains(make(1).key)


def test_a_failing_cache_costs_nothing_but_time(tiers, make, monkeypatch):
    memory = tiers[0]

    def broken(chunk):
        raise StoreError("broken")

    monkeypatch.setattr(memory, "put", broken)
    store = TieredStore(tiers)
    store.put(make(1))
    assert store.get_with_tier(make(1).key)[1] == "disk"


def test_a_chunk_hot_in_memory_does_not_grow_old_on_disk(root, make):
    disk = DiskStore(root, max_bytes=3 * 1_440)
    store = TieredStore([MemoryStore(BIG), disk])
    for number in range(3):
        store.put(make(number))
    assert store.get_with_tier(make(0).key)[1] == "memory"
    store.put(make(3))
    assert [disk.contains(make(number).key) for number in range(4)] == [True, False, True, True]


def test_damage_and_absence_are_told_apart(root, tiers, make):
    memory = tiers[0]
    store = TieredStore(tiers)
    store.put(make(1))
    memory.delete([make(1).key])
    StoreLayout(root).chunk_path(make(1).key, (0, 1)).write_bytes(b"junk")
    with pytest.raises(ChunkDamaged):
        store.get(make(1).key)
    with pytest.raises(ChunkMissing):
        store.get(make(1).key)
    assert store.prefetch([make(1).key]) == 0


def test_of_absences_the_durable_tiers_is_told(tiers, make):
    with pytest.raises(ChunkMissing, match="ingest its text again"):
        TieredStore(tiers).get(make(1).key)


def test_a_middle_tier_that_is_damaged_falls_back_to_the_slowest(tmp_path, make):
    middle, slow = DiskStore(tmp_path / "a"), DiskStore(tmp_path / "b")
    store = TieredStore([MemoryStore(0), middle, slow])
    store.put(make(1))
    StoreLayout(tmp_path / "a").chunk_path(make(1).key, (0, 1)).write_bytes(b"junk")
    assert torch.equal(store.get(make(1).key), make(1).kv)
    assert torch.equal(middle.get(make(1).key), make(1).kv)


def test_delete_everywhere(tiers, make):
    store = TieredStore(tiers)
    store.put(make(1))
    store.delete(iter([make(1).key]))
    assert not any(tier.contains(make(1).key) for tier in tiers)


def test_open_store_follows_the_configuration(root, make, ingest):
    config = BlendConfig(store_path=str(root), max_memory_gb=0.5, max_disk_gb=1)
    with_memory = open_store(config)
    alone = open_store(config.replace(local_device="disk"))
    catalogue = open_catalogue(config)
    assert [tier.name for tier in with_memory.tiers] == ["memory", "disk"]
    assert [tier.name for tier in alone.tiers] == ["disk"]
    ingest(with_memory, catalogue, make(1), "doc")
    assert alone.get_with_tier(make(1).key)[1] == "disk"
    assert catalogue.release("doc") == [make(1).key]
    assert with_memory.delete_unheld([make(1).key]) == [make(1).key]
    assert with_memory.locate(make(1).key) is None
    assert catalogue.missing([make(1).key]) == [make(1).key]
    for opened in (with_memory, alone, catalogue):
        opened.close()
        opened.close()


def test_the_bound_of_the_configuration_holds(root, make):
    store = open_store(BlendConfig(store_path=str(root), max_disk_gb=0))
    with pytest.raises(StoreFull):
        store.put(make(1))
    store.close()


def test_the_catalogue_opens_without_torch():
    code = "import sys, kvblend_rag.store.open, kvblend_rag.store.catalogue; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
