import dataclasses
import threading
import weakref

import pytest
import torch

from kvblend_rag.errors import ChunkMissing
from kvblend_rag.store import MemoryStore, StoredChunk
from kvblend_rag.store.page_locking import Spare, locked_bytes


def test_the_least_recently_used_leaves_first(make):
    one = make(1).kv.nbytes
    store = MemoryStore(3 * one)
    chunks = [make(number) for number in range(4)]
    for chunk in chunks[:3]:
        store.put(chunk)
    store.read(chunks[0].key)
    store.put(chunks[3])
    assert [store.contains(chunk.key) for chunk in chunks] == [True, False, True, True]
    assert store.nbytes() == 3 * one
    with pytest.raises(ChunkMissing):
        store.get(chunks[1].key)


def test_what_does_not_fit_is_silently_not_kept(make):
    small, large = make(1), make(2, tokens=64)
    store = MemoryStore(small.kv.nbytes)
    store.put(small)
    store.put(large)
    assert store.contains(small.key)
    assert not store.contains(large.key)
    nothing = MemoryStore(0)
    nothing.put(small)
    assert nothing.nbytes() == 0
    assert not nothing.contains(small.key)


def test_put_again_replaces(make, same):
    store = MemoryStore(1 << 20)
    store.put(make(1))
    again = StoredChunk(make(1).key, "model-a", make(1).token_ids, make(1).kv + 1)
    store.put(again)
    same(store.read(again.key), again)
    assert store.nbytes() == again.kv.nbytes
    store.delete([again.key, make(2).key])
    assert store.nbytes() == 0


def test_a_view_does_not_keep_its_whole_tensor_alive(make):
    pool = torch.zeros(64, 2, 8, 2, 4)
    chunk = make(1)
    store = MemoryStore(1 << 20)
    store.put(StoredChunk(chunk.key, chunk.namespace, chunk.token_ids, pool[:2]))
    assert store.get(chunk.key).untyped_storage().nbytes() == store.nbytes()


def test_threads_keep_the_count_right(make):
    chunks = [make(number) for number in range(8)]
    store = MemoryStore(4 * chunks[0].kv.nbytes)
    failures = []

    def work(seed):
        for step in range(300):
            chunk = chunks[(seed * 7 + step) % 8]
            store.put(chunk)
            try:
                if not torch.equal(store.get(chunk.key), chunk.kv):
                    failures.append("wrong tensor")
            except ChunkMissing:
                pass
            if step % 5 == 0:
                store.delete([chunk.key])
            if store.nbytes() > 4 * chunk.kv.nbytes:
                failures.append("over the bound")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.nbytes() == sum(chunk.kv.nbytes for chunk in chunks if store.contains(chunk.key))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinning needs CUDA")
def test_pinned_copies(make, same):
    store = MemoryStore(1 << 20, pin=True)
    store.put(make(1))
    assert store.get(make(1).key).is_pinned()
    same(store.read(make(1).key), make(1))


def test_page_locked_chunks_count_as_what_they_take(make, monkeypatch):
    """In powers of two, or the machine runs out of memory long before the bound is reached."""
    chunks = [make(number, tokens=33) for number in range(4)]
    one = chunks[0].kv.nbytes
    taken = locked_bytes(one)
    assert taken > one
    ours = []
    monkeypatch.setattr(MemoryStore, "_own", lambda self, chunk: chunk)
    monkeypatch.setattr(Spare, "bound", lambda self, nbytes: ours.append(nbytes))
    store = MemoryStore(2 * taken + one, pin=True)
    for chunk in chunks:
        store.put(chunk)
    assert [store.contains(chunk.key) for chunk in chunks] == [False, False, True, True]
    assert store.nbytes() == 2 * taken
    assert ours == [taken, 2 * taken, 2 * taken, 2 * taken]
    store.delete([chunks[3].key])
    assert store.nbytes() == taken
    small = MemoryStore(taken - 1, pin=True)
    small.put(chunks[0])
    assert not small.contains(chunks[0].key)


class PageLocked:
    """As PyTorch's allocator of page-locked memory: powers of two, and what was freed is kept for its own size."""

    def __init__(self, monkeypatch):
        self.taken = self.most = 0
        self.free = {}
        monkeypatch.setattr(MemoryStore, "_own", lambda store, chunk: self.lock(chunk))
        monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: {"allocated_bytes.current": self.taken})
        monkeypatch.setattr(torch._C, "_host_emptyCache", self.empty, raising=False)

    def lock(self, chunk):
        kv = chunk.kv.clone()
        size = locked_bytes(kv.nbytes)
        if self.free.get(size):
            self.free[size] -= 1
        else:
            self.taken += size
            self.most = max(self.most, self.taken)
        weakref.finalize(kv, lambda: self.free.update({size: self.free.get(size, 0) + 1}))
        return dataclasses.replace(chunk, kv=kv)

    def empty(self):
        self.taken -= sum(size * count for size, count in self.free.items())
        self.free.clear()


def test_page_locked_memory_is_bounded_whatever_the_sizes_that_come(make, monkeypatch):
    memory = PageLocked(monkeypatch)
    sizes = (640, 384, 832, 192, 640, 1600, 384)
    largest = locked_bytes(max(make(0, tokens=tokens).kv.nbytes for tokens in sizes))
    bound, spare = 8 * largest, largest
    monkeypatch.setattr("kvblend_rag.store.memory._LEAST_SPARE", spare)
    store = MemoryStore(bound, pin=True)
    for number, tokens in enumerate(tokens for tokens in sizes for _ in range(40)):
        store.put(make(number, tokens=tokens))
    assert store.nbytes() > bound - largest
    assert memory.most <= bound + spare + largest  # one is on its way while room is made for it


def test_the_least_often_used_leaves_first(make):
    one = make(1).kv.nbytes
    store = MemoryStore(3 * one, eviction="lfu")
    chunks = [make(number) for number in range(6)]
    for chunk in chunks[:3]:
        store.put(chunk)
    for number, uses in ((0, 3), (1, 1), (2, 2)):
        for _ in range(uses):
            store.read(chunks[number].key)
    store.read(chunks[1].key)  # the latest use, and still not the most uses
    store.put(chunks[0])  # again: its uses are not forgotten
    for passing in chunks[3:]:  # a scan takes one place, not all
        store.put(passing)
    kept = [store.contains(chunk.key) for chunk in chunks]
    assert kept[0]
    assert sum(kept[1:3]) == 1
    assert kept[3:] == [False, False, True]
