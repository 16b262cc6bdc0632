import contextlib
import os
import random
import shutil
import sqlite3
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvblend_rag.blend.chunk import chunk_key
from kvblend_rag.errors import StoreError
from kvblend_rag.store import Catalogue, StoreLayout, tables
from kvblend_rag.store.tables import ANONYMOUS, ChunkRow

SPACE = "model-a"


@pytest.fixture
def catalogue(root):
    catalogue = Catalogue(root)
    yield catalogue
    catalogue.close()


def row(number, space=SPACE, rank=0, size=1, tokens=8):
    token_ids = np.arange(number, number + tokens, dtype=np.int32)
    return ChunkRow(chunk_key(space, token_ids), space, token_ids, rank, size, 100)


def key(number, space=SPACE):
    return row(number, space).key


def test_the_newest_chunks_of_a_namespace(catalogue):
    for number in range(5):
        catalogue.add(*row(number))
    catalogue.add(*row(9, space="model-b"))
    catalogue.add(*row(7, size=2))  # of two ranks one has written
    catalogue.remove([key(3)])
    assert list(catalogue.newest(SPACE, 2)) == [key(4), key(2)]
    assert list(catalogue.newest(SPACE, 9)) == [key(4), key(2), key(1), key(0)]
    assert catalogue.newest(SPACE, 1)[key(4)].tolist() == row(4).token_ids.tolist()


def test_add_shows_up_with_its_tokens(catalogue):
    catalogue.add(*row(1))
    changes = catalogue.changes_since(0, SPACE)
    assert [name for name, _ in changes.added] == [key(1)]
    assert changes.added[0][1].dtype == np.int32
    assert changes.added[0][1].tolist() == list(range(1, 9))
    assert changes.removed == []
    assert not changes.reset
    assert catalogue.changes_since(0, "model-b").added == []
    assert catalogue.changes_since(changes.cursor, SPACE).added == []


def test_groups_end_with_their_documents(catalogue):
    catalogue.join([("g", "1"), ("g", "2"), ("h", "2"), ("g%", "3")])
    catalogue.join([("g", "4")], tenant="other")
    catalogue.hold("1", [key(1), key(2)])
    catalogue.hold("2", [key(2)])
    assert sorted(catalogue.members("g")) == ["1", "2"]
    assert catalogue.members("g", tenant="other") == ["4"]
    assert sorted(catalogue.all_members("g")) == ["1", "2", "3"]
    assert catalogue.all_members("g%") == ["3"]
    assert sorted(catalogue.all_members("")) == ["1", "2", "3"]
    assert {name: sorted(keys) for name, keys in catalogue.chunks_of(["1", "2", "unknown", ""]).items()} == {
        "1": sorted([key(1), key(2)]),
        "2": [key(2)],
    }
    catalogue.replace_holds("1", [key(3)])  # edited: still a member
    assert sorted(catalogue.members("g")) == ["1", "2"]
    catalogue.release("2")
    assert (catalogue.members("g"), catalogue.members("h")) == (["1"], [])


def test_a_catalogue_from_before_there_were_groups(catalogue, root):
    catalogue.close()
    with sqlite3.connect(StoreLayout(root).catalogue) as sql:
        sql.execute("DROP TABLE member")
        sql.execute("PRAGMA user_version = 1")
    again = Catalogue(root)
    again.join([("g", "1")])
    assert again.members("g") == ["1"]
    again.close()


def test_a_chunk_is_visible_when_its_last_rank_is(catalogue):
    for rank in (0, 1):
        assert catalogue.missing([key(1), key(2)]) == [key(1), key(2)]
        assert catalogue.changes_since(0, SPACE).added == []
        catalogue.add_rows([row(1, rank=rank, size=3)] * 2)
    catalogue.add(*row(1, rank=2, size=3))
    assert catalogue.missing([key(1), key(2), key(2)]) == [key(2)]
    assert [name for name, _ in catalogue.changes_since(0, SPACE).added] == [key(1)]
    assert catalogue.stats() == {"chunks": 1, "tokens": 8, "bytes": 300, "namespaces": 1, "documents": 0}


def test_another_number_of_ranks_starts_anew(catalogue):
    catalogue.add(*row(1))
    cursor = catalogue.changes_since(0, SPACE).cursor
    catalogue.add(*row(1, rank=0, size=2))
    changes = catalogue.changes_since(cursor, SPACE)
    assert changes.removed == [key(1)]
    assert catalogue.missing([key(1)]) == [key(1)]
    catalogue.add(*row(1, rank=1, size=2))
    assert [name for name, _ in catalogue.changes_since(changes.cursor, SPACE).added] == [key(1)]


@pytest.mark.parametrize("bad", [row(1)._replace(key="../x"), row(1, rank=1), row(1, tokens=0)])
def test_what_is_no_chunk_is_not_listed(catalogue, bad):
    with pytest.raises(StoreError):
        catalogue.add_rows([row(2), bad])
    assert catalogue.missing([key(2)]) == [key(2)], "a failed transaction must leave nothing"
    catalogue.add(*row(3))
    assert catalogue.missing([key(2), key(3)]) == [key(2)], "and must not spoil the next"


def test_removed_and_added_again(catalogue):
    catalogue.add(*row(1))
    start = catalogue.changes_since(0, SPACE).cursor
    catalogue.remove([key(1), key(2)])
    gone = catalogue.changes_since(start, SPACE)
    assert (gone.added, gone.removed) == ([], [key(1)])
    catalogue.add(*row(1))
    for cursor in (0, start, gone.cursor):
        changes = catalogue.changes_since(cursor, SPACE)
        assert [name for name, _ in changes.added] == [key(1)]
        assert changes.removed == []


def test_documents_hold_chunks(catalogue):
    catalogue.hold("a", [key(1), key(2)])
    catalogue.hold("a", [key(2)])
    catalogue.hold("b", [key(2), key(3)])
    catalogue.hold("b", [key(3)], tenant="t")
    catalogue.hold(ANONYMOUS, [key(4)])
    assert sorted(catalogue.documents()) == [("", "a", 2), ("", "b", 2), ("t", "b", 1)]
    assert catalogue.held([key(n) for n in range(6)]) == {key(n) for n in (1, 2, 3, 4)}
    assert catalogue.release("a") == [key(1)]
    assert catalogue.release("a") == []
    assert set(catalogue.replace_holds("b", [key(5)])) == {key(2)}
    assert catalogue.release("b", "t") == [key(3)]
    assert catalogue.held([key(n) for n in range(6)]) == {key(4), key(5)}
    assert catalogue.stats()["documents"] == 1


def test_remove_unless_held(catalogue):
    catalogue.add_rows([row(1), row(2), row(3)])
    catalogue.hold("doc", [key(1)])
    catalogue.hold(ANONYMOUS, [key(2)])
    assert catalogue.unheld() == [key(3)]
    assert catalogue.remove([key(1), key(2), key(3)], unless_held=True) == [key(3)]
    assert catalogue.remove([key(2)]) == [key(2)]
    assert catalogue.held([key(2)]) == set(), "the anonymous hold goes with its chunk"
    catalogue.remove([key(1)])
    assert catalogue.held([key(1)]) == {key(1)}, "a document outlives an evicted chunk"


def test_changed_tells_of_everyones_commits_and_is_cheap(root, catalogue):
    other = Catalogue(root)
    assert catalogue.changed()
    cursor = catalogue.changes_since(0, SPACE).cursor
    assert not catalogue.changed()
    other.add(*row(1))
    assert catalogue.changed()
    assert catalogue.changed(), "until it was read"
    cursor = catalogue.changes_since(cursor, SPACE).cursor
    assert not catalogue.changed()
    catalogue.add(*row(2))
    assert catalogue.changed()
    catalogue.changes_since(cursor, SPACE)
    other.close()


def test_removals_off_the_record_reset_the_reader(catalogue, monkeypatch):
    monkeypatch.setattr(tables, "_REMOVALS_KEPT", 10)
    catalogue.add_rows([row(n) for n in range(30)])
    cursor = catalogue.changes_since(0, SPACE).cursor
    for n in range(20):
        catalogue.remove([key(n)])
    late = catalogue.changes_since(cursor, SPACE)
    assert late.reset
    assert {name for name, _ in late.added} == {key(n) for n in range(20, 30)}
    assert late.removed == []
    recent = catalogue.changes_since(late.cursor - 5, SPACE)
    assert not recent.reset
    assert len(recent.removed) == 5


def test_a_cursor_of_a_former_catalogue_resets(catalogue):
    catalogue.add(*row(1))
    changes = catalogue.changes_since(1_000, SPACE)
    assert changes.reset
    assert len(changes.added) == 1


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "remove", "follow", "hold", "release", "replace"]),
        st.integers(0, 5),
        st.integers(0, 1),
    ),
    max_size=40,
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS)
def test_against_a_model(tmp_path_factory, steps):
    """Any history: a follower, however rarely it looks, knows what a newcomer learns; holds add up."""
    root = tmp_path_factory.mktemp("model")
    catalogue, reader = Catalogue(root), Catalogue(root)
    ranks, holds, followed = {}, {}, {}
    cursor = 0

    def follow():
        nonlocal cursor
        changes = reader.changes_since(cursor, SPACE)
        assert changes.cursor >= cursor
        assert not {name for name, _ in changes.added} & set(changes.removed)
        for name in changes.removed:
            followed.pop(name, None)
        followed.update((name, tokens.tolist()) for name, tokens in changes.added)
        cursor = changes.cursor

    def unheld(keys):
        return {name for name in keys if not any(name in held for held in holds.values())}

    for step, number, choice in steps:
        name, document = key(number), str(choice)
        if step == "add":
            catalogue.add(*row(number, rank=choice, size=2))
            ranks.setdefault(number, set()).add(choice)
        elif step == "remove":
            catalogue.remove([name])
            ranks.pop(number, None)
        elif step == "follow":
            follow()
        elif step == "hold":
            catalogue.hold(document, [name])
            holds.setdefault(document, set()).add(name)
        elif step == "release":
            before = holds.pop(document, set())
            assert set(catalogue.release(document)) == unheld(before)
        else:
            before, holds[document] = holds.get(document, set()), {name}
            assert set(catalogue.replace_holds(document, [name])) == unheld(before)
        visible = {number for number, known in ranks.items() if len(known) == 2}
        assert set(catalogue.missing([key(n) for n in range(6)])) == {key(n) for n in range(6) if n not in visible}
    follow()
    assert followed == {key(n): row(n).token_ids.tolist() for n in visible} if steps else not followed
    assert {name for name, _ in reader.changes_since(0, SPACE).added} == set(followed)
    assert catalogue.held([key(n) for n in range(6)]) == set().union(*holds.values())
    catalogue.close()
    reader.close()


def test_threads_and_a_follower(root, catalogue):
    other = Catalogue(root)
    failures, known, cursor = [], set(), 0

    def work(seed):
        rng = random.Random(seed)
        try:
            for _ in range(40):
                number = rng.randrange(10)
                if rng.random() < 0.6:
                    (catalogue if seed % 2 else other).add(*row(number))
                else:
                    catalogue.remove([key(number)])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or catalogue.changed():
        changes = catalogue.changes_since(cursor, SPACE)
        known = (known - set(changes.removed)) | {name for name, _ in changes.added}
        cursor = changes.cursor
    assert failures == []
    assert known == {name for name, _ in other.changes_since(0, SPACE).added}
    other.close()


def test_a_hundred_thousand_chunks_load(catalogue):
    tokens = np.arange(256, dtype=np.int32)
    catalogue.add_rows(ChunkRow(f"{n:032x}", SPACE, tokens, 0, 1, 1) for n in range(100_000))
    changes = catalogue.changes_since(0, SPACE)
    assert len(changes.added) == 100_000
    assert catalogue.changes_since(changes.cursor, SPACE).added == []


def test_a_row_with_a_flipped_token_is_never_handed_out(root, catalogue):
    catalogue.add_rows([row(1), row(2)])
    with sqlite3.connect(StoreLayout(root).catalogue) as sql:
        sql.execute("UPDATE chunk SET token_ids = zeroblob(length(token_ids)) WHERE key = ?", (key(1),))
    assert [name for name, _ in catalogue.changes_since(0, SPACE).added] == [key(2)]


@pytest.mark.parametrize("damage", ["junk", "header", "pages", "tables"])
def test_a_corrupt_file_is_one_clear_sentence(root, damage):
    with_rows = Catalogue(root)
    with_rows.add_rows([row(n) for n in range(200)])
    with_rows.close()
    path = StoreLayout(root).catalogue
    raw = bytearray(path.read_bytes())
    if damage == "junk":
        path.write_bytes(os.urandom(len(raw)))
    elif damage == "header":
        raw[:16] = bytes(16)
        path.write_bytes(raw)
    elif damage == "pages":
        raw[4096:] = os.urandom(len(raw) - 4096)
        path.write_bytes(raw)
    else:
        with sqlite3.connect(path) as sql:
            sql.execute("DROP TABLE change")

    def use():
        Catalogue(root).changes_since(0, SPACE)

    with pytest.raises(StoreError, match="kvblend store check") as caught:
        use()
    assert str(path) in str(caught.value)


def test_a_later_format_is_refused(root):
    Catalogue(root).close()
    with sqlite3.connect(StoreLayout(root).catalogue) as sql:
        sql.execute("PRAGMA user_version = 7")
    with pytest.raises(StoreError, match="upgrade"):
        Catalogue(root)


def test_a_closed_catalogue_says_so(root):
    catalogue = Catalogue(root)
    catalogue.close()
    with pytest.raises(StoreError, match="closed"):
        catalogue.stats()
    with pytest.raises(StoreError, match="closed"):
        catalogue.add(*row(1))


def test_another_file_at_its_place_is_turned_to(root, catalogue, tmp_path):
    """As after a device was mounted anew; while nothing stands there, what is open answers."""
    catalogue.add(*row(1))
    catalogue.changes_since(0, SPACE)
    path = StoreLayout(root).catalogue
    shutil.copytree(root, tmp_path / "restored")
    path.rename(tmp_path / "away")
    assert not catalogue.changed()
    assert catalogue.stats()["chunks"] == 1
    for name in (f"{path.name}-wal", f"{path.name}-shm"):
        (root / name).unlink()
    for copied in (tmp_path / "restored").glob(f"{path.name}*"):
        copied.rename(root / copied.name)
    assert catalogue.changed()
    catalogue.add(*row(2))
    with contextlib.closing(Catalogue(root)) as other:
        assert other.stats()["chunks"] == 2
        other.add(*row(3))
    assert catalogue.stats()["chunks"] == 3
    catalogue.close()
    path.rename(tmp_path / "again")
    Catalogue(root).close()
    with pytest.raises(StoreError, match="closed"):
        catalogue.stats()
