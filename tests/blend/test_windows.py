import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvblend_rag.blend.windows import WindowTable, window_hashes


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=80), st.integers(1, 33))
def test_a_windows_hash_depends_on_its_tokens_alone(tokens, window):
    array = np.array(tokens, np.int32)
    hashes = window_hashes(array, window)
    assert hashes.shape == (max(len(tokens) - window + 1, 0),)
    for start, value in enumerate(hashes):
        assert window_hashes(array[start : start + window], window)[0] == value


def test_different_windows_have_different_hashes():
    tokens = np.random.default_rng(0).integers(0, 30_000, 100_000).astype(np.int32)
    assert len(np.unique(window_hashes(tokens, 16))) == 100_000 - 15


def test_leading_zeros_and_order_count():
    rows = ([0, 0, 1, 2], [0, 1, 0, 2], [1, 2, 0, 0], [2, 1, 0, 0], [0, 0, 0, 0])
    assert len({int(window_hashes(np.array(row, np.int32), 4)[0]) for row in rows}) == len(rows)


@pytest.mark.parametrize("batches", [1, 7, 400])
def test_every_entry_is_found_however_it_came_in(batches):
    random = np.random.default_rng(1)
    hashes = random.integers(0, 3000, 12_000).astype(np.uint64)
    slots, offsets = np.arange(12_000), random.integers(0, 500, 12_000)
    table = WindowTable()
    for part in np.array_split(np.arange(12_000), batches):
        table.insert(hashes[part], slots[part], offsets[part])
    alive = random.random(12_000) < 0.5
    for keep in (np.ones(12_000, bool), alive):
        table.purge(keep)
        wanted = np.arange(4000, dtype=np.uint64)
        found = {}
        for at, low, high in zip(*table.find(wanted), strict=True):
            found.setdefault(int(at), []).extend(zip(*(x.tolist() for x in table.places(low, high)), strict=True))
        expected = {}
        for value, slot, offset in zip(
            hashes[keep].tolist(), slots[keep].tolist(), offsets[keep].tolist(), strict=True
        ):
            expected.setdefault(value, []).append((slot, offset))
        assert {k: sorted(v) for k, v in found.items()} == expected
        assert len(table) == keep.sum()


def test_an_empty_table_finds_nothing():
    assert [len(column) for column in WindowTable().find(np.arange(5, dtype=np.uint64))] == [0, 0, 0]
