"""The scripts in tools/ that put results of `kvblend eval` together, on results of a few numbers."""

import importlib.util
import json
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


def _tool(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pool():
    return _tool("pool_quality")


@pytest.fixture(scope="module")
def compare():
    return _tool("compare_quality")


def _sample(**values):
    common = {"exact": 0.0, "f1": 0.5, "same": 1.0, "nll": 1.0, "kl": 0.0}
    return common | {"recomputed": 0.1, "computed": 0.2, "scored": 0.0, "blended": 1.0} | values


def _result(questions, kl=0.2, kind="lookup", **more):
    arms = {"plain": {"blend": False}, "reuse": {"selector": "none"}}
    rows = [
        {"id": name, "set": "two_chunk", "kind": kind, "arms": {"plain": _sample(), "reuse": _sample(kl=kl, nll=1.5)}}
        for name in questions
    ]
    return {
        "command": f"kvblend eval {''.join(questions)}",
        "date": "2026-11-28",
        "seconds": 10.0,
        "machine": {},
        "engine": {"model": "m"},
        "settings": {"ingest_context": "long", "questions": len(rows), "no_time": 3},
        "arms": {name: {"options": options, "context": None} for name, options in arms.items()},
        "samples": rows,
        **more,
    }


def test_every_question_counts_once_as_the_last_sitting_has_it(pool):
    result = pool.pooled([_result("ab", kl=0.1), _result("bc", kl=0.4)])
    assert [row["id"] for row in result["samples"]] == ["a", "b", "c"]
    assert result["groups"]["all"]["arms"]["reuse"]["kl"][0] == pytest.approx(0.3)
    assert result["groups"]["all"]["arms"]["reuse"]["nll_change"][0] == pytest.approx(0.5)
    assert result["settings"]["questions"] == 3
    assert [each["questions"] for each in result["sittings"]] == [2, 2]
    assert result["between_sittings"]["questions"] == 1
    assert result["between_sittings"]["mean_difference"]["reuse"]["kl"] == pytest.approx(0.3)


def test_made_questions_that_need_two_chunks_are_a_group_again(pool):
    result = pool.pooled([_result("a"), _result("b", kind="pronoun")])
    assert result["groups"]["answers from two chunks"]["questions"] == 1


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"engine": {"model": "another"}}, "engine"),
        ({"arms": {}}, "arms"),
        ({"settings": {"ingest_context": "bos"}}, "ingest context"),
    ],
)
def test_what_does_not_belong_together_is_not_pooled(pool, other, what):
    with pytest.raises(ValueError, match=what):
        pool.pooled([_result("a"), _result("b", **other)])


def test_the_command_writes_the_pooled_result(pool, tmp_path, monkeypatch, capsys):
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps(_result(name)))
    files = [str(tmp_path / f"{name}.json") for name in ("a", "b")]
    monkeypatch.setattr("sys.argv", ["pool_quality.py", *files, "--json", str(tmp_path / "out.json")])
    assert pool.main() == 0
    assert json.loads((tmp_path / "out.json").read_text())["settings"]["questions"] == 2
    assert capsys.readouterr().out == "2 questions.\n"


def test_two_results_are_compared_over_the_questions_of_both(compare):
    groups = compare.compared(_result("abc", kl=0.4), _result("bcd", kl=0.1), ["reuse"])
    row = groups["all"]["arms"]["reuse"]
    assert groups["all"]["questions"] == 2
    assert groups["questions made here"]["questions"] == 2
    assert "real questions" not in groups
    assert row["kl_ratio"] == [0.25, 0.25, 0.25]
    assert row["nll_difference"] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("ending", "options"),
    [
        ("@similar", ["--contexts", "", "similar"]),
        (":carry=0.75", ["--options", "", "carry=0.75"]),
        (":carry=0.75@bos", ["--options", "", "carry=0.75", "--contexts", "", "bos"]),
    ],
)
def test_one_results_arms_are_compared_with_those_of_another_ending(compare, ending, options, tmp_path, monkeypatch):
    both = _result("abc", kl=0.4)
    for row in both["samples"]:
        row["arms"][f"reuse{ending}"] = {**row["arms"]["reuse"], "kl": 0.3}
    file, out = tmp_path / "both.json", tmp_path / "out.json"
    file.write_text(json.dumps(both))
    given = [str(file), str(file), "--arms", "reuse", *options, "--json", str(out)]
    monkeypatch.setattr("sys.argv", ["compare_quality.py", *given])
    compare.main()
    row = json.loads(out.read_text())["comparison"]["all"]["arms"]["reuse"]
    assert row["kl_ratio"] == pytest.approx([0.75, 0.75, 0.75])


@pytest.fixture(scope="module")
def roc():
    return _tool("risk_roc")


@pytest.mark.parametrize("telling", ["moved", "disputed", "disputed_early", None])
def test_the_risk_is_tried_on_sets_that_it_was_not_fitted_to(roc, telling):
    """Answers differ where one signal says so; the others are the same for all."""
    samples = []
    for number in range(60):
        differs = number % 3 == 0
        signals = {
            "uncovered": 0.5,
            "doubt": 0.3,
            "weakest": 0.5,
            **({telling: 0.2 + 0.5 * differs} if telling else {}),
        }
        samples.append({"set": "ab"[number % 2], "arms": {"question": _sample(same=float(not differs), **signals)}})
    found = roc.held_out(samples, "question")
    assert list(found) == ["all", "a", "b"]
    aucs = {name: each["auc"] for name, each in found["all"].items()}
    nothing = {"answer": 0.5, "first": 0.5, "default": 0.5, "default_first": 0.5}
    told = {
        "moved": {"answer": 1.0, "first": 1.0, "answer_unmoved": 0.5, "first_unmoved": 0.5, "moved": 1.0},
        "disputed": {"answer": 1.0, "default": 1.0, "answer_undisputed": 0.5, "disputed": 1.0},
        "disputed_early": {
            "first": 1.0,
            "default_first": 1.0,
            "first_undisputed_early": 0.5,
            "disputed_early": 1.0,
        },
        None: {},
    }
    assert aucs == nothing | told[telling]
    assert (found["all"]["answer"]["questions"], found["all"]["answer"]["differ"]) == (60, 20)
