"""`kvblend torture store`: it passes, and it would notice."""

import json

import pytest

from kvblend_rag.cli import main
from kvblend_rag.commands import torture_damage, torture_kill


def test_ten_rounds(tmp_path, capsys):
    target = tmp_path / "result.json"
    assert main(["torture", "store", "--rounds", "10", "--json", str(target)]) == 0
    result = json.loads(target.read_text())
    kills, damage = result["kills"], result["damage"]
    assert kills["acknowledged"] > 0
    assert kills["compared"] > 0
    assert sum(kills["killed_during"].values()) > 5
    assert kills["mended"]["catalogues lost"] == 1
    assert damage["tried"] == damage["refused"]
    assert damage["tried"]["damaged"] > 1_000
    assert "0 wrong" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["a row before its file", "an acknowledgement before the chunk", "no hold"])
def test_a_store_that_loses_something_is_found_out(tmp_path, monkeypatch, fault):
    real = torture_kill.put_and_list

    def late(store, catalogue, chunks, shard):
        if fault == "an acknowledgement before the chunk":
            return
        if fault == "a row before its file":
            for chunk in chunks:
                catalogue.add(chunk.key, chunk.namespace, chunk.token_ids, *shard, chunk.kv.nbytes)
            return
        real(store, catalogue, chunks, shard)
        for tenant, document, _ in catalogue.documents():
            catalogue.replace_holds(document, [], tenant)

    monkeypatch.setattr(torture_kill, "put_and_list", late)
    assert torture_kill.run(tmp_path, rounds=4)["wrong"]


def test_a_store_that_does_not_verify_is_found_out(tmp_path, monkeypatch):
    chunk = torture_damage._short(torture_kill.make(1))
    monkeypatch.setattr(torture_damage.DiskStore, "read", lambda store, key: chunk)
    result = torture_damage.run(tmp_path)
    assert len(result["wrong"]) > 1_000


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--writers", "99"]])
def test_numbers_that_make_no_sense(arguments, capsys):
    assert main(["torture", "store", *arguments]) == 2
    assert "--rounds" in capsys.readouterr().err
