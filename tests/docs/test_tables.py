"""Tables made from code and result files are up to date, and hold what they should."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def generate() -> Any:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_up_to_date(generate: Any) -> None:
    for page in generate.PAGES:
        text = page.read_text(encoding="utf-8")
        assert generate.with_blocks(text) == text, "run `python docs/generate.py`"


def test_every_setting_is_described_with_its_default(generate: Any) -> None:
    from kvblend_rag.config import BlendConfig

    table = generate.configuration()
    for field in dataclasses.fields(BlendConfig):
        (row,) = (line for line in table.splitlines() if line.startswith(f"| `{field.name}` |"))
        _, _, default, meaning, _ = (
            row.split(" | ") if row.startswith(" |") else ["", *row.strip("| ").split(" | "), ""]
        )
        assert len(meaning) > 20, field.name
        if field.default is not dataclasses.MISSING and field.name != "store_path":
            assert json.loads(default.strip("`")) == json.loads(json.dumps(field.default))


def test_request_options_are_the_codes() -> None:
    from kvblend_rag import config

    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", text, re.MULTILINE))
    assert {name: listed[name] for name in config._REQUEST_OPTIONS} == config._REQUEST_OPTIONS


def test_selectors_are_all_described() -> None:
    from kvblend_rag.selectors import _BUILT_IN

    text = (ROOT / "docs" / "budget.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in _BUILT_IN)


def test_counts_in_the_text_are_the_demos() -> None:
    import inspect

    from kvblend_rag.commands import demo
    from kvblend_rag.demo.library import load_documents

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"precomputes {len(load_documents())} document sections" in readme
    assert f"asks {inspect.signature(demo.run).parameters['questions'].default} questions" in readme


def test_capacity_of_known_models(generate: Any) -> None:
    rows = {line.split(" | ")[0].strip("| "): line for line in generate.capacity().splitlines()}
    for model, kib in (("Qwen2.5-7B", 56), ("Llama-3.1-8B", 128), ("Qwen3-8B", 144), ("Llama-3.1-70B", 320)):
        assert f"| {kib} KiB |" in rows[model]


def test_costs_are_the_commands(generate: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from kvblend_rag.cli import main

    assert main(["plan-capacity", "--model", "Qwen3-8B", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    rows = {line.split(" | ")[0].strip("| "): line for line in generate.capacity_tiers().splitlines()}
    cells = [f"{tier['dollars_a_million']:,.2f}" for tier in said["tiers"].values()]
    head = [f"{said['prefill_tokens_per_second']:,.0f}", f"{said['break_even_gb_per_second']:,.2f}"]
    assert rows["Qwen3-8B"] == f"| Qwen3-8B | {' | '.join(head + cells)} |"


def test_what_an_h100_did_is_as_the_results_say() -> None:
    from kvblend_rag.commands.capacity import MODELS

    done = []
    for name in ("Llama-3.1-8B", "Llama-3.2-3B", "Qwen2.5-7B"):
        text = (ROOT / "docs" / "results" / f"gpu-ttft-{name.lower()}.json").read_text(encoding="utf-8")
        for arms in json.loads(text)["results"].values():
            rate = arms["plain"]["tokens"]["computed_tokens"] / arms["plain"]["median_ms"] * 1e3
            done.append(rate * 2 * MODELS[name].parameters / 1e3)
    page = (ROOT / "docs" / "capacity.md").read_text(encoding="utf-8")
    assert f"{min(done):.0f} to {max(done):.0f}" in page


def test_a_result_file_becomes_a_table(generate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spread = {"median": 1.5, "min": 1.0, "max": 2.0}
    row = {"name": "question, 15%", "seconds": spread, "speedup": {**spread, "median": 4.25}}
    row |= {f"{group}_tokens": 100 for group in ("prompt", "reused", "recomputed", "computed")}
    result = {"command": "kvblend bench ttft --json /root/x/y.json", "rows": [row], "engine": {"dtype": "float32"}}
    (tmp_path / "cpu-ttft.json").write_text(json.dumps(result))
    (tmp_path / "other.json").write_text(json.dumps({"rate": 0.5, "machine": {"cpu": "x"}}))
    monkeypatch.setattr(generate, "RESULTS", tmp_path)
    shown = generate.results()
    assert "| question, 15% | 100 |" in shown
    assert "4.25" in shown
    assert "/root" not in shown
    assert "`rate`" in shown
    assert "4.25" in generate.headline()


def test_a_result_of_eval_becomes_tables(generate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(**values: float) -> dict[str, list[float]]:
        names = ("exact", "f1", "same", "kl", "recomputed", "computed", "blended", "nll_change", "f1_share")
        return {name: [values.get(name, 0.5)] * 3 for name in names}

    fixed = {**row(nll_change=0.01, f1_share=0.9, recomputed=0.1, kl=0.4), "kl_share": [0.3, 0.2, 0.4]}
    adaptive, reuse = row(recomputed=0.05, kl=0.3), row(recomputed=0, kl=0.8)
    arms = {"plain": row(blended=0), "question:0.15": fixed, "question:0.5:coverage=0.8": adaptive, "reuse": reuse}
    group = {"questions": 120, "arms": arms}
    result = {
        "command": "kvblend eval ../shared/data/val",
        "date": "2026-01-01",
        "engine": {"dtype": "bfloat16"},
        "settings": {"questions": 120, "too_long": 2, "no_time": 0, "ingest_context": "document", "span_size": 16},
        "arms": {name: {"options": {"coverage": 0.8} if "cov" in name else {}} for name in arms},
        "groups": {"all": group, "kind: multi_hop": group, "kind: compare": {**group, "questions": 99}},
        "ttft": {"plain": {"seconds": {"median": 0.5}, "speedup": {"median": 1.0}}},
        "samples": [{"set": "musique"}] * 120,
    }
    (tmp_path / "quality-x.json").write_text(json.dumps(result))
    monkeypatch.setattr(generate, "RESULTS", tmp_path)
    shown = generate.quality()
    assert "kvblend eval ../shared/data/val" in shown
    assert "Questions: 120 (120 of musique); 2 too long for the context." in shown
    assert "| ΔNLL, real questions, ≤ 0.02 | +0.010 | reached |" in shown
    assert "0.30 (0.20 to 0.40) | reached by the estimate; undecided |" in shown
    assert "| F1 as a share of plain's, ≥ 98 % | 90% | not reached |" in shown
    assert "| F1 of kind: multi_hop, ≥ 95 % | 90% | not reached |" in shown
    assert "F1 of kind: compare" not in shown  # fewer than 100 questions
    assert "| kind: compare | 99 | +0.010 (90%) |" in shown
    assert "| question:0.5:coverage=0.8 | 0.50 at 5% |" in shown
    assert "plain 500 ms (1.00×)" in shown
    assert "musique" not in generate.results()
    result["samples"] = [{"set": "aggregate"}] * 120
    (tmp_path / "quality-x.json").write_text(json.dumps(result))
    assert "was to be reached" not in generate.quality(), "made questions are no real ones"
