import json

import torch

from kvblend_rag.cli import main
from kvblend_rag.commands.torture_kill import make
from kvblend_rag.store import Catalogue, DiskStore
from kvblend_rag.store.encoding import ENCODINGS, round_trip
from kvblend_rag.store.listing import put_and_list


def test_it_measures_the_chunks_of_a_store(tmp_path, capsys):
    catalogue = Catalogue(tmp_path)
    store = DiskStore(tmp_path, catalogue=catalogue)
    put_and_list(store, catalogue, [make(number) for number in range(3)], (0, 1))
    store.close()
    assert main(["bench", "encodings", "--store", str(tmp_path), "--chunks", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["settings"]["chunks"] == 1
    assert set(result["rows"]) == set(ENCODINGS)
    assert result["rows"]["none"]["bytes_per_token"] == 2 * 2 * 2 * 4 * 4
    assert result["rows"]["none"]["keys"]["max"] == 0
    kv = make(min(range(3), key=lambda number: make(number).key)).kv
    back = round_trip(kv, "int4")
    expected = (back - kv)[:, 1].norm() / kv[:, 1].norm()
    assert torch.isclose(torch.tensor(result["rows"]["int4"]["values"]["max"]), expected)


def test_an_empty_store_has_nothing_to_measure(tmp_path, capsys):
    assert main(["bench", "encodings", "--store", str(tmp_path)]) == 2
    assert "holds no chunks" in capsys.readouterr().err
