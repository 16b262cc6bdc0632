import json

import pytest

from kvblend_rag.bulk.feed import DELETE, UPSERT, Columns, check_columns, entries_of_file, entries_of_lines, entry_of
from kvblend_rag.demo.library import load_documents
from kvblend_rag.errors import ConfigError

NAMES = Columns()


@pytest.mark.parametrize(
    ("row", "operation"),
    [
        ({"id": "a", "text": "Some text."}, UPSERT),
        ({"id": 7, "text": "Some text.", "operation": None}, UPSERT),
        ({"id": "a", "text": "Some text.", "operation": " Update "}, UPSERT),
        ({"id": "a", "operation": "delete"}, DELETE),
        ({"id": "a", "text": "ignored", "operation": "REMOVE"}, DELETE),
    ],
)
def test_a_row_says_what_to_do(row, operation):
    entry = entry_of(row, "here:1", NAMES)
    assert (entry.reason, entry.operation, entry.id) == ("", operation, str(row["id"]))
    assert entry.text == ("" if operation == DELETE else "Some text.")


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({}, "no id in its column 'id'"),
        ({"id": "", "text": "x"}, "no id"),
        ({"id": True, "text": "x"}, "no id"),
        ({"id": ["a"], "text": "x"}, "no id"),
        ({"id": "a"}, "no text in its column 'text'"),
        ({"id": "a", "text": 5}, "no text"),
        ({"id": "a", "text": "x", "operation": "merge"}, "'merge' is unknown"),
        ({"id": "a", "text": "half \ud83d"}, "half a surrogate pair"),
    ],
)
def test_a_row_that_says_nothing_says_why(row, why):
    entry = entry_of(row, "here:1", NAMES)
    assert why in entry.reason
    assert entry.source == "here:1"


def test_other_names_of_columns():
    names = Columns(id="key", text="body", operation="op")
    assert entry_of({"key": "a", "body": "x", "op": "delete"}, "", names).operation == DELETE
    assert "'key'" in entry_of({"id": "a", "text": "x"}, "", names).reason


def test_lines_that_are_no_json_objects_are_one_entry_each_and_harm_no_other():
    good = json.dumps({"id": "a", "text": "one\u2028line"}, ensure_ascii=False)
    content = b"\n".join([good.encode(), b"", b"{torn", b"[1]", b"\xff\xfe", good.replace('"a"', '"b"').encode()])
    found = list(entries_of_lines(content, "f.jsonl", NAMES))
    assert [each.id for each in found if not each.reason] == ["a", "b"]
    assert found[0].text == "one\u2028line"
    assert [each.source for each in found if each.reason] == ["f.jsonl:3", "f.jsonl:4", "f.jsonl:5"]


def test_files_become_the_documents_that_ingest_makes_without_ray(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "manual.md").write_text("Before.\n\n# First use\n\nFill it.\n\n## Notes\n\nClean it.\n")
    (tmp_path / "plain.txt").write_text("A text.")
    found = [
        entry
        for path in ("plain.txt", "sub/manual.md")
        for entry in entries_of_file((tmp_path / path).read_bytes(), str(tmp_path / path), str(tmp_path))
    ]
    assert [(each.id, each.text) for each in found] == [
        (f"{tmp_path}/{document.id}", document.content) for document in load_documents(tmp_path)
    ]
    (bad,) = entries_of_file(b"\xff\xfe\xff", str(tmp_path / "bad.txt"), str(tmp_path))
    assert "not UTF-8" in bad.reason


def test_a_bad_row_replaces_no_good_one_and_digests_tell_all_apart():
    good, other = (entry_of({"id": "a", "text": text}, "f:1", NAMES) for text in ("x", "y"))
    bad = entry_of({"id": "a"}, "f:2", NAMES)
    gone = entry_of({"id": "a", "operation": "delete"}, "f:3", NAMES)
    assert good.id_hash == other.id_hash == gone.id_hash != bad.id_hash
    assert len({each.digest for each in (good, other, bad, gone)}) == 4
    moved = entry_of({"id": "a", "text": "x"}, "g:9", NAMES)
    assert moved.digest == good.digest  # the file's name is not what a document is


def test_a_table_without_ids_or_texts_is_refused():
    check_columns(["id", "text", "more"], NAMES, "t")
    check_columns(["id", "operation"], NAMES, "t")
    for found in (["text"], ["id"], []):
        with pytest.raises(ConfigError, match=r"has no column '(id|text)'"):
            check_columns(found, NAMES, "t.parquet")
