"""`kvblend torture load` and `orders`: they pass, and they would notice."""

import json

import numpy as np
import pytest

from kvblend_rag.cli import main
from kvblend_rag.commands.torture_load import Asked
from kvblend_rag.commands.torture_orders import _violations


def test_an_answer_is_wrong_from_the_first_token_that_differs_and_no_tie():
    asked = Asked("plain", np.zeros(3, np.int32), (5, 6, 7, 8), (1.0, 1e-4, 1.0, 1.0))
    assert not asked.differs([5, 6, 7, 8])
    assert not asked.differs([5, 6])
    assert not asked.differs([])
    assert asked.differs([5, 6, 9])
    assert asked.differs([1])
    assert not asked.differs([5, 9, 1, 1])  # either was right, and what follows is another answer


def test_figures_that_are_not_reached_are_told():
    good = {
        "reused_share": 0.99,
        "last_to_first": 1.0,
        "store_bytes_at_most": 100,
        "store_bound_bytes": 100,
        "chunks_missing": 5,
    }
    assert _violations(good) == []
    bad = {"reused_share": 0.97, "last_to_first": 0.89, "store_bytes_at_most": 102, "chunks_missing": 0}
    for name, value in bad.items():
        assert len(_violations({**good, name: value})) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["load", "--clients", "0"],
        ["load", "--minutes", "0"],
        ["orders", "--orders", "1"],
        ["orders", "--per-prompt", "300"],
    ],
    ids=" ".join,
)
def test_numbers_that_make_no_sense(arguments, capsys):
    assert main(["torture", *arguments]) == 2
    assert arguments[1] in capsys.readouterr().err


@pytest.mark.full
def test_load(rigs, tmp_path):
    rigs.close()
    target = tmp_path / "load.json"
    assert main(["torture", "load", "--clients", "40", "--minutes", "0.4", "--json", str(target)]) == 0
    result = json.loads(target.read_text())
    assert result["wrong"] == []
    assert result["preemptions"] > 0
    assert {"plain answered", "everything answered", "none answered", "question answered"} <= set(result["requests"])
    assert any("left" in outcome for outcome in result["requests"])


@pytest.mark.full
def test_orders(rigs, tmp_path):
    rigs.close()
    target = tmp_path / "orders.json"
    arguments = ["--orders", "20", "--chunks", "60", "--per-prompt", "6", "--json", str(target)]
    assert main(["torture", "orders", *arguments]) in (0, 1)  # how fast a busy machine is, is nobody's fault
    result = json.loads(target.read_text())
    assert result["reused_share"] >= 0.98
    assert result["chunks_missing"] > 0
    assert result["store_bytes_at_most"] <= 1.01 * result["store_bound_bytes"]
