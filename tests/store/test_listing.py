"""A chunk in the catalogue is a chunk in the store, also when others evict while it is being listed."""

import os
import threading

import pytest
import torch

from kvblend_rag.errors import StoreFull
from kvblend_rag.store import Catalogue, DiskStore, StoreLayout
from kvblend_rag.store.listing import put_and_list
from kvblend_rag.store.upkeep import check

SHARD = (0, 1)


@pytest.mark.parametrize("moment", ["before its row", "after its row"])
def test_a_chunk_evicted_while_it_is_listed_is_put_again(root, make, opened, monkeypatch, moment):
    store, catalogue = opened()
    other, _ = opened()
    chunk, times = make(1), []
    add = catalogue.add_rows

    def evicting(rows):
        rows = list(rows)
        if not times and moment == "before its row":
            other.evict(0)
        add(rows)
        if not times and moment == "after its row":
            other.evict(0)
        times.append(1)

    monkeypatch.setattr(catalogue, "add_rows", evicting)
    put_and_list(store, catalogue, [chunk], SHARD)
    assert len(times) == 2
    assert catalogue.missing([chunk.key]) == []
    assert torch.equal(store.get(chunk.key), chunk.kv)
    assert check(root).ok


def test_an_eviction_under_way_is_waited_for(root, make, opened, monkeypatch):
    """The evictor has dropped the row, of which there is none yet, and has not come to the file."""
    store, catalogue = opened()
    evictor, theirs = opened()
    chunk = make(1)
    looked, listed = threading.Event(), threading.Event()
    remove = theirs.remove

    def slow(keys, unless_held=False):
        gone = remove(keys, unless_held)
        looked.set()
        assert listed.wait(20)
        return gone

    monkeypatch.setattr(theirs, "remove", slow)
    add = catalogue.add_rows

    def adding(rows):
        if not thread.ident:
            thread.start()
            assert looked.wait(20)
        add(rows)
        listed.set()

    monkeypatch.setattr(catalogue, "add_rows", adding)
    thread = threading.Thread(target=evictor.evict, args=(0,))
    put_and_list(store, catalogue, [chunk], SHARD)
    thread.join()
    assert store.contains(chunk.key)
    assert catalogue.missing([chunk.key]) == []
    assert check(root).ok


def test_a_store_in_which_nothing_stays_says_so_and_lists_nothing(make, opened, monkeypatch):
    store, catalogue = opened()
    add = catalogue.add_rows

    def evicting(rows):
        add(rows)
        os.unlink(StoreLayout(store._layout.root).chunk_path(make(1).key, SHARD))

    monkeypatch.setattr(catalogue, "add_rows", evicting)
    with pytest.raises(StoreFull, match="max_disk_gb"):
        put_and_list(store, catalogue, [make(1)], SHARD)
    assert catalogue.missing([make(1).key]) == [make(1).key]


def test_writers_and_an_evictor(root, make):
    """What a writer was told is listed has a file, though another evicts all the time."""
    stop, problems = threading.Event(), []

    def evict():
        catalogue = Catalogue(root)
        store = DiskStore(root, catalogue=catalogue)
        while not stop.is_set():
            store.evict(3 * 1_440)
        store.close()

    def write(seed):
        catalogue = Catalogue(root)
        store = DiskStore(root, catalogue=catalogue)
        for step in range(40):
            try:
                put_and_list(store, catalogue, [make(seed * 100 + step % 7)], SHARD)
            except StoreFull:
                continue
            except Exception as error:
                problems.append(repr(error))
        store.close()

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(2)]
    evictor = threading.Thread(target=evict)
    for thread in (evictor, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    evictor.join()
    assert problems == []
    result = check(root)
    assert (result.rows_without_file, result.damaged_files) == ([], [])
