"""`kvblend bench planner`: its cases, and what it makes of their times; the sweep itself needs minutes."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from kvblend_rag.cli import main
from kvblend_rag.commands import bench_planner
from kvblend_rag.commands.bench_planner import Case, _Sweep, forget_pages, setups, table
from kvblend_rag.commands.shapes import SHAPES
from kvblend_rag.report import BlendReport


def test_the_sweep_holds_what_may_not_pay():
    sweep = setups(200, ["redis://h", "s3://bucket/prefix"])
    names = [case.name for setup in sweep for case in setup.cases]
    slow = {"slow remote tier, valkey", "slow remote tier, s3"}
    assert {"short chunks", "cold disk", "busy engine", "tiny model"} | slow <= set(names)
    assert len(names) == len(set(names))
    assert not slow & {case.name for setup in setups(200) for case in setup.cases}
    for setup in sweep:
        assert setup.shape is None or setup.shape in SHAPES
        for case in setup.cases:
            assert case.chunks * case.chunk_tokens + case.question_tokens + 16 < 12 * 200 + 512


class Kv:
    """An engine's handle that keeps what it is given."""

    def __init__(self, folder):
        self.ingested = []
        self.config = SimpleNamespace(store_path=str(folder))

    def ingest(self, chunks, progress):
        self.ingested += chunks


def sweep(tmp_path, case):
    kv = Kv(tmp_path)
    return _Sweep(SimpleNamespace(kvblend=kv), case, 0), kv


def test_only_known_chunks_are_stored(tmp_path):
    assert len(sweep(tmp_path, Case("a", 3, 20))[1].ingested) == 6
    assert sweep(tmp_path, Case("a", 3, 20, known=False))[1].ingested == []


def answer(seconds, **report):
    return SimpleNamespace(metrics=SimpleNamespace(ttft=seconds), report=BlendReport(prompt_tokens=100, **report))


def test_a_row_says_how_planned_compares_with_plain(tmp_path):
    measured, _ = sweep(tmp_path, Case("a", 3, 20))
    row = measured._row(
        {
            "plain": [answer(1.0), answer(2.0), answer(4.0)],
            "planned": [answer(0.5, blended=True), answer(2.0, reason="too slow"), answer(4.4, blended=True)],
            "loaded": [answer(2.0), answer(4.0), answer(8.0)],
        }
    )
    assert row["ratio"]["planned"]["median"] == 1.0
    assert row["ratio"]["loaded"]["median"] == 2.0
    assert row["ratio"]["planned"]["mean"][0] == pytest.approx((0.5 + 1 + 1.1) / 3, abs=1e-4)
    assert (row["blended"], row["reason"]) == (2 / 3, "too slow")
    console = Console(width=200, record=True)
    console.print(table({"rows": [row], "settings": {"shape": "small", "repeats": 3}}))
    assert "1.000" in console.export_text()


def test_pages_are_forgotten_and_files_stay(tmp_path):
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "file"
    path.write_bytes(b"kept" * 10_000)
    forget_pages(tmp_path)
    assert path.read_bytes() == b"kept" * 10_000


@pytest.mark.parametrize(
    "arguments",
    [["--shape", "huge"], ["--repeats", "0"], ["--chunk-tokens", "0"], ["--remote", "ftp://host"]],
    ids=" ".join,
)
def test_what_can_not_be_measured(arguments, capsys):
    assert main(["bench", "planner", *arguments]) == 2
    assert arguments[-1 if "--remote" in arguments else 0] in capsys.readouterr().err


def test_every_prompt_has_a_header_of_its_own(tmp_path):
    """Else one arm would find the other's blocks in the prefix cache."""
    measured, kv = sweep(tmp_path, Case("a", 2, 20))
    prompts = []

    class Llm:
        kvblend = kv

        async def stream(self, prompt, sampling, blend):
            prompts.append((prompt, blend))
            yield answer(0.1)

    measured._llm = Llm()
    for blend in bench_planner.ARMS.values():
        asyncio.run(measured._ask(kv.ingested[:2], blend))
    assert [blend for _, blend in prompts] == list(bench_planner.ARMS.values())
    heads = {prompt[:16].tobytes() for prompt, _ in prompts}
    assert len(heads) == 3
    for prompt, _ in prompts:
        assert len(prompt) == 16 + 40 + 32
        assert np.array_equal(prompt[16:56], np.concatenate(kv.ingested[:2]))
