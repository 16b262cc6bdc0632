import os
import sqlite3
import time

import pytest
import torch

from kvblend_rag.errors import StoreError
from kvblend_rag.store import Catalogue, DiskStore, StoreLayout
from kvblend_rag.store.upkeep import check, gc

SPACE = "model-a"


@pytest.fixture
def filled(make, opened, ingest):
    """Chunks 0 to 3 held by a document, 4 and 5 by nobody in particular."""
    store, catalogue = opened()
    for number in range(6):
        ingest(store, catalogue, make(number), "doc" if number < 4 else "")
    return store, catalogue


def path_of(root, chunk, shard=(0, 1)):
    return StoreLayout(root).chunk_path(chunk.key, shard)


def leave_temporary(root, chunk, age=3600.0):
    temporary = StoreLayout(root).temporary_path(path_of(root, chunk))
    temporary.write_bytes(b"half")
    os.utime(temporary, (time.time() - age,) * 2)
    return temporary


def visible(catalogue):
    return {key for key, _ in catalogue.changes_since(0, SPACE).added}


def test_a_sound_store_is_ok(root, filled, make):
    for repair in (False, True):
        result = check(root, repair=repair)
        assert result.ok
        assert (result.files, result.nbytes) == (6, 6 * make(0).kv.nbytes)
        assert len(result.summary()) == 1


def test_what_is_wrong_is_found_and_mended(root, filled, make, capsys):
    store, catalogue = filled
    damaged, gone, unlisted = path_of(root, make(0)), path_of(root, make(1)), path_of(root, make(2))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    gone.unlink()
    catalogue.remove([make(2).key])
    temporary = leave_temporary(root, make(3))
    with sqlite3.connect(StoreLayout(root).catalogue) as sql:
        sql.execute("UPDATE chunk SET token_ids = zeroblob(32) WHERE key = ?", (make(4).key,))

    for repair in (False, True):
        result = check(root, repair=repair, progress=repair)
        assert not result.ok
        assert result.damaged_files == [damaged.name]
        assert result.rows_without_file == [gone.name]
        assert result.files_without_row == [unlisted.name]
        assert result.damaged_rows == [make(4).key]
        assert result.temporaries == [temporary.name]
        assert len(result.summary()) == 6
        assert temporary.exists() != repair
    assert "5/5" in capsys.readouterr().err
    assert check(root).ok
    assert visible(catalogue) == {make(number).key for number in range(2, 6)}
    assert all(torch.equal(store.get(make(n).key), make(n).kv) for n in range(2, 6))
    tokens = dict(catalogue.changes_since(0, SPACE).added)
    assert tokens[make(4).key].tolist() == make(4).token_ids.tolist()
    assert gc(root).unheld == []


@pytest.mark.parametrize("damage", ["junk", "deleted"])
def test_a_lost_catalogue_is_rebuilt(root, filled, make, damage):
    for opened in filled:
        opened.close()
    path = StoreLayout(root).catalogue
    if damage == "junk":
        path.write_bytes(b"junk" * 4096)
        found = check(root)
        assert "--repair" in found.summary()[1]
        assert path.read_bytes() == b"junk" * 4096, "a look changes nothing"
    else:
        path.unlink()
    result = check(root, repair=True)
    assert (result.catalogue_problem is not None) == (damage == "junk")
    assert len(result.files_without_row) == 6
    assert check(root).ok
    catalogue = Catalogue(root)
    assert visible(catalogue) == {make(number).key for number in range(6)}
    assert gc(root).unheld == [], "rebuilt chunks are held anonymously"
    catalogue.close()


def test_a_busy_catalogue_is_not_taken_for_a_damaged_one(root, filled, monkeypatch):
    monkeypatch.setattr("kvblend_rag.store.database._BUSY_S", 0.05)
    catalogue = Catalogue(root)
    blocker = sqlite3.connect(StoreLayout(root).catalogue, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="locked"):
        check(root, repair=True)
    blocker.execute("ROLLBACK")
    assert list(StoreLayout(root).damaged.iterdir()) == []
    catalogue.close()


def test_a_chunk_that_lost_one_rank_is_dropped_whole(root, make, opened, ingest):
    for rank in range(2):
        ingest(*opened(shard=(rank, 2)), make(1, rank=rank), "doc", rank, 2)
    path_of(root, make(1), (1, 2)).write_bytes(b"junk")
    check(root, repair=True)
    catalogue = Catalogue(root)
    assert visible(catalogue) == set()
    assert check(root).ok
    ingest(*opened(shard=(1, 2)), make(1, rank=1), "doc", 1, 2)
    assert visible(catalogue) == {make(1).key}
    catalogue.close()


def test_remains_of_another_number_of_ranks_do_not_displace_a_chunk(root, make, opened, ingest):
    store, catalogue = opened()
    ingest(store, catalogue, make(1), "doc")
    remains = DiskStore(root, shard=(0, 2))
    remains.put(make(1))
    check(root, repair=True)
    assert visible(catalogue) == {make(1).key}
    assert not remains.contains(make(1).key)
    assert store.contains(make(1).key)


def test_gc_removes_what_nobody_holds_and_leftovers(root, filled, make):
    store, catalogue = filled
    assert gc(root).nbytes == 0
    catalogue.release("doc")
    catalogue.hold("other", [make(0).key])
    leave_temporary(root, make(1))
    (StoreLayout(root).damaged / "old").write_bytes(b"12345")
    before = store.nbytes()
    result = gc(root, progress=True)
    assert set(result.unheld) == {make(number).key for number in (1, 2, 3)}
    assert (result.temporaries, result.quarantined) == (1, 1)
    assert result.nbytes == before - store.nbytes() + 4 + 5
    assert visible(catalogue) == {make(number).key for number in (0, 4, 5)}
    assert "3 chunks" in result.summary()
    assert check(root).ok


def test_gc_down_to_a_bound(root, filled, make):
    store, catalogue = filled
    store.get(make(0).key)
    result = gc(root, max_bytes=store.nbytes() // 2)
    assert result.over_bound == [make(number).key for number in (1, 2, 3)]
    assert visible(catalogue) == {make(number).key for number in (0, 4, 5)}
    assert check(root).ok


def test_a_file_being_written_is_no_leftover(root, filled, make):
    young = leave_temporary(root, make(1), age=0.0)
    assert check(root).ok
    gc(root)
    assert young.exists()


@pytest.mark.parametrize("run", [check, gc])
def test_no_store_is_said_and_none_is_made(root, run):
    with pytest.raises(StoreError, match="no store"):
        run(root)
    assert not root.exists()
