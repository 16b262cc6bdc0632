import json

import pytest

from kvblend_rag.bulk.feed import DELETE, Columns, Entry, entries_of_lines
from kvblend_rag.bulk.ledger import DeadLetters, Ledger
from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import ConfigError


@pytest.fixture
def config(tmp_path):
    return BlendConfig(store_path=str(tmp_path / "store"), model="m")


def done(config, data_set="d"):
    return sorted(Ledger(config, data_set).done().tolist())


def test_what_was_added_is_found_by_the_next_run_until_one_is_complete(config):
    ledger = Ledger(config, "d")
    assert done(config) == []
    ledger.add([3, 2**64 - 1])
    ledger.add([])
    ledger.add([5])
    assert done(config) == [3, 5, 2**64 - 1]  # while it is open: a killed run closes nothing
    ledger.close()
    again = Ledger(config, "d")
    again.add([7])
    assert done(config) == [3, 5, 7, 2**64 - 1]
    again.complete()
    assert done(config) == []


def test_a_torn_end_is_left_out_and_written_over(config, tmp_path):
    ledger = Ledger(config, "d")
    ledger.add([3])
    ledger.close()
    (path,) = (tmp_path / "store" / "ingest").iterdir()
    path.write_bytes(path.read_bytes() + b"\1\2\3")
    assert done(config) == [3]
    again = Ledger(config, "d")
    again.add([4])
    assert done(config) == [3, 4]


def test_another_data_set_model_or_tenant_has_a_ledger_of_its_own(config):
    Ledger(config, "d").add([3])
    assert done(config, "e") == []
    for change in ({"model": "n"}, {"tenant": "t"}, {"chunk_size": 64}, {"system_prompt": "Be brief."}):
        assert done(config.replace(**change)) == []
    assert done(config.replace(max_disk_gb=1.0, selector="none")) == [3]


def test_dead_letters_are_a_data_set_and_an_older_file_is_gone(tmp_path):
    path, names = tmp_path / "sub" / "dead.jsonl", Columns(id="key")
    path.parent.mkdir()
    path.write_text("old")
    letters = DeadLetters(path, names)
    assert not path.exists()
    failed = [Entry(source="f:1", id="a", text="Text ä.", reason="why"), Entry(source="f:2", operation=DELETE, id="b")]
    letters.add(failed)
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[0])["reason"] == "why"
    again = list(entries_of_lines(path.read_bytes(), "x", names))
    assert [(each.id, each.operation, each.text) for each in again] == [
        (each.id, each.operation, each.text) for each in failed
    ]
    assert letters.count == 2


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"dead\.jsonl can't be written"):
        DeadLetters(tmp_path / "file" / "dead.jsonl", Columns()).add([Entry(source="f:1")])
