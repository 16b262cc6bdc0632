"""What documents hold outlives the catalogue."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvblend_rag.errors import StoreError
from kvblend_rag.store import Catalogue, StoreLayout
from kvblend_rag.store.journal import Journal
from kvblend_rag.store.upkeep import check, gc

KEYS = [f"{number:032x}" for number in range(6)]


def lose(root):
    for path in root.glob("catalogue.sqlite*"):
        path.unlink()


def holds(catalogue):
    return {
        (tenant, name): sorted(catalogue.chunks_of([name], tenant)[name]) for tenant, name, _ in catalogue.documents()
    }


@pytest.mark.parametrize("damage", ["junk", "deleted"])
def test_documents_survive_a_lost_catalogue(root, make, opened, ingest, damage):
    store, catalogue = opened()
    for number in range(4):
        ingest(store, catalogue, make(number), "doc" if number < 2 else "other" if number < 3 else "")
    catalogue.hold("doc", [make(3).key], "tenant")
    catalogue.join([("shelf", "doc")])
    catalogue.replace_holds("other", [make(1).key])
    before = holds(catalogue)
    store.close()
    if damage == "deleted":
        lose(root)
    else:
        StoreLayout(root).catalogue.write_bytes(b"junk" * 4_096)
    assert "journal" in " ".join(check(root, repair=True).summary()) or damage == "deleted"
    again = Catalogue(root)
    assert holds(again) == before
    assert again.members("shelf") == ["doc"]
    assert again.release("doc") == [make(0).key], "and not what another document holds"
    assert check(root).ok
    assert set(gc(root).unheld) == {make(0).key}
    again.close()


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["hold", "hold", "replace", "release", "join", "tidy", "lose"]),
        st.sampled_from(["", "ada"]),
        st.sampled_from(["a", "b\n", "ü"]),
        st.lists(st.sampled_from(KEYS), min_size=1, max_size=4),
    ),
    max_size=25,
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS)
def test_any_history_is_read_back(tmp_path_factory, steps):
    root = tmp_path_factory.mktemp("journal")
    catalogue = Catalogue(root)
    expected, groups = {}, set()
    for step, tenant, document, keys in steps:
        if step == "hold":
            catalogue.hold(document, keys, tenant)
            expected.setdefault((tenant, document), set()).update(keys)
        elif step == "replace":
            catalogue.replace_holds(document, keys, tenant)
            expected[tenant, document] = set(keys)
        elif step == "release":
            catalogue.release(document, tenant)
            expected.pop((tenant, document), None)
            groups = {each for each in groups if (each[0], each[2]) != (tenant, document)}
        elif step == "join":
            catalogue.join([("g", document)], tenant)
            groups.add((tenant, "g", document))
        elif step == "tidy":
            assert catalogue.tidy_journal() == 0
        else:
            catalogue.close()
            lose(root)
            catalogue = Catalogue(root)
        assert holds(catalogue) == {name: sorted(held) for name, held in expected.items()}
        assert {(t, "g", d) for t in ("", "ada") for d in catalogue.members("g", t)} == groups
    catalogue.close()


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_cut_short_loses_itself_only(root, cut):
    catalogue = Catalogue(root)
    catalogue.hold("a", KEYS[:2])
    catalogue.hold("b", KEYS[2:3])
    path = StoreLayout(root).journal
    path.write_bytes(path.read_bytes()[:-cut])
    catalogue.hold("c", KEYS[3:4])
    read = Journal(StoreLayout(root)).read()
    assert read.damaged == (cut > 1)
    whole = {("", "a"): set(KEYS[:2]), ("", "b"): set(KEYS[2:3]), ("", "c"): set(KEYS[3:4])}
    assert read.documents == {name: keys for name, keys in whole.items() if cut == 1 or name != ("", "b")}
    result = check(root, repair=True)
    assert result.journal_lines == (cut > 1)
    assert check(root).ok
    assert Journal(StoreLayout(root)).read().documents == whole, "the catalogue knew"
    catalogue.close()


def test_flipped_bytes_are_never_taken_for_a_record(root):
    catalogue = Catalogue(root)
    catalogue.hold("a", KEYS[:1])
    catalogue.close()
    path = StoreLayout(root).journal
    whole = path.read_bytes()
    for position in range(len(whole)):
        raw = bytearray(whole)
        raw[position] ^= 4
        path.write_bytes(raw)
        read = Journal(StoreLayout(root)).read()
        assert read.documents in ({}, {("", "a"): {KEYS[0]}})
        assert read.documents == {} or position == len(whole) - 1


def test_a_hold_that_can_not_be_written_down_is_not_kept(root, monkeypatch):
    catalogue = Catalogue(root)

    def full(path, records):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvblend_rag.store.journal._append", full)
    with pytest.raises(StoreError, match="No space"):
        catalogue.hold("a", KEYS[:1])
    assert catalogue.documents() == []
    catalogue.close()


def test_a_store_of_an_older_release_gets_a_journal(root):
    catalogue = Catalogue(root)
    catalogue.hold("a", KEYS[:1])
    catalogue.close()
    StoreLayout(root).journal.unlink()
    Catalogue(root).close()
    lose(root)
    again = Catalogue(root)
    assert holds(again) == {("", "a"): KEYS[:1]}
    again.close()
