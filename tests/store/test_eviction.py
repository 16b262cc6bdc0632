import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvblend_rag.store import Catalogue, DiskStore, StoreLayout, usage
from kvblend_rag.store.eviction import Queue, after_use, latest

DAY = 86_400 * 10**9
FILE = 1_440  # the size of one of `make`'s files, see test_disk


def test_a_use_makes_recent_with_lru_and_is_worth_a_day_with_lfu():
    now = 400 * DAY
    assert after_use("lru", 5, now) == now
    assert after_use("lfu", 300 * DAY, now) == 301 * DAY
    assert after_use("lfu", 0, now) == now - 364 * DAY  # of a year's age, not of fifty
    assert after_use("lfu", now + 365 * DAY, now) == now + 365 * DAY < latest("lfu", now)
    assert now < latest("lru", now) < now + DAY


steps = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["set", "discard", "first"]), st.integers(0, 9)))


@given(steps)
def test_the_queue_is_a_dictionary_and_its_minimum(given_steps):
    queue, model = Queue(), {}
    for key, what, number in given_steps:
        if what == "set":
            queue.set(key, number)
            model[key] = number
        elif what == "discard":
            queue.discard(key)
            model.pop(key, None)
        first = queue.first()
        assert first == min(model, key=lambda each: (model[each], each), default=None)
        assert queue.number(key) == model.get(key)


@pytest.fixture
def often(root):
    stores = []

    def often(bound):
        layout = StoreLayout(root, eviction="lfu")
        stores.append(DiskStore(layout, max_bytes=bound, catalogue=Catalogue(layout)))
        return stores[-1]

    yield often
    for store in stores:
        store.close()


def test_on_a_disk_the_least_often_used_leaves_first_whoever_used_it(monkeypatch, often, make):
    monkeypatch.setattr(usage, "_SCAN_SHARE", float("inf"))  # look at what others did each time, and not by the clock
    store, other = often(3 * FILE), often(3 * FILE)
    for number in range(3):
        store.put(make(number))
    for number, uses in ((0, 1), (1, 3), (2, 2)):
        for _ in range(uses):
            (store, other)[uses % 2].read(make(number).key)
    store.touch(make(0).key)
    store.touch(make(0).key)
    store.read(make(0).key)  # four uses now, and the third one two
    other.put(make(3))
    assert [store.contains(make(number).key) for number in range(4)] == [True, True, False, True]
    store.put(make(4))  # what has no use yet leaves before what has some
    assert [store.contains(make(number).key) for number in range(5)] == [True, True, False, False, True]
    assert store.nbytes() == 3 * FILE


def test_the_setting_reaches_both_tiers_and_a_store_may_change_it(often, root, make):
    from kvblend_rag.config import BlendConfig
    from kvblend_rag.store import open_store

    store = open_store(BlendConfig(store_path=str(root), eviction="lfu"))
    store.put(make(1))
    path = StoreLayout(root).chunk_path(make(1).key, (0, 1))
    before = path.stat().st_mtime_ns
    store.read(make(1).key)
    assert path.stat().st_mtime_ns == before + DAY
    store.close()
    recent = open_store(BlendConfig(store_path=str(root)))  # a time in the future is of no use to LRU
    assert path.stat().st_mtime_ns <= os.stat(root).st_mtime_ns + 60 * 10**9
    recent.close()
