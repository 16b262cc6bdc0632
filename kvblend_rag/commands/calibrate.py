"""``kvblend calibrate``: how well does this model blend, at which budget, behind which ingest context? A verdict."""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from kvblend_rag.calibration.verdict import Verdict, best_of, write_verdict
from kvblend_rag.commands import terminal
from kvblend_rag.commands.machine import engine_facts, machine
from kvblend_rag.commands.session import EngineOptions, check_writable, started
from kvblend_rag.config import BlendConfig
from kvblend_rag.demo.library import BUNDLED, load_documents
from kvblend_rag.errors import ConfigError
from kvblend_rag.quality import bootstrap
from kvblend_rag.quality.calibration_plot import save_plot
from kvblend_rag.quality.fit import auc, fit_risk
from kvblend_rag.quality.forcing import engine_arguments
from kvblend_rag.quality.judge import Limits, judge, kept
from kvblend_rag.quality.measure import ADAPTIVE, BUDGETS, Judged, measure
from kvblend_rag.quality.measurement import Cell, Measurement
from kvblend_rag.quality.observe import prepare
from kvblend_rag.quality.probes import probes
from kvblend_rag.quality.prompt import renderer
from kvblend_rag.quality.questions import Question, read_questions

if TYPE_CHECKING:
    from rich.console import Console

CONTEXTS = ("document", "long")
"""The ingest contexts that are measured when none are named."""

MOST, MINUTES = 384, 20.0
"""Questions that are asked at most, and about how long, all ingest contexts together."""

_FIRST = 24
"""Questions behind a context before it is looked whether these tell enough."""


def run(
    *,
    engine: EngineOptions,
    docs: str | None = None,
    questions: str | None = None,
    count: int = MOST,
    minutes: float = MINUTES,
    contexts: Sequence[str] = CONTEXTS,
    arms: Sequence[str] | None = None,
    max_loss: float = Limits.loss,
    json: str | None = None,
) -> int:
    """Measure a model and write its verdicts beside the store, with a plot.

    Args:
        engine: model, and the store beside which the verdicts go; its chunks are not touched.
        docs: folder of texts that questions are made from.
        questions: file of questions with documents, in place of made ones; see ``quality.questions``.
        count: how many are asked at most; fewer where these tell enough.
        minutes: about how long to go on asking, shared among the contexts; the first questions of each are asked.
        contexts: ingest contexts to measure, one engine start each.
        arms: ways of blending; see ``quality.arms``.
        max_loss: nats a token of the gold answer that may be lost.
        json: where to write everything that was measured.

    Returns:
        0 when a way of blending is accepted, 1 when none is.

    Raises:
        KVBlendError: a file, context or model that can't be used, or no engine.
    """
    if count < 1:
        raise ConfigError(f"--count is {count}, and must be 1 or more.")
    if minutes <= 0:
        raise ConfigError(f"--minutes is {minutes:g}, and must be more than 0.")
    config = _resolved(engine)
    for kind in contexts:
        config.replace(ingest_context=kind)
    check_writable(config)
    asked = _questions(docs, questions, count)
    console, before, begun = terminal.prose(json), machine(), time.perf_counter()
    result: dict[str, Any] = {
        "command": shlex.join(["kvblend", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": before,
        "questions": {},
        "contexts": {},
    }
    verdicts, limits = [], Limits(loss=max_loss)
    for kind in contexts:
        ways = arms or (*BUDGETS, *ADAPTIVE)
        measured, rows, kinds, facts = _measured(
            config, kind, asked, ways, limits, 60 * minutes / len(contexts), verbose=engine.verbose
        )
        risk = fit_risk([each.signals for each in rows], [each.differs for each in rows])
        verdict = judge(measured, limits, risk)
        path = write_verdict(verdict, config.store_path)
        verdicts.append(verdict)
        result["engine"] = facts
        result["questions"] = max(result["questions"], kinds, key=lambda each: sum(each.values()))
        result["seconds"] = round(time.perf_counter() - begun, 1)
        result["contexts"][kind] = {
            "verdict": verdict.to_dict(),
            "measurement": measured.to_dict(),
            "risk_auc_in_sample": _auc(verdict, rows),
        }
        console.print(_table(measured, verdict))
        _tell(console, measured, verdict, path)
        # after each engine, so that an interruption keeps what was measured
        if json not in (None, "-"):
            terminal.write_json(result, json)
    best = best_of(verdicts)
    if best is not None:
        console.print(
            f"[bold green]Accepted[/]: {escape(best.model)} blends with ingest_context: {best.context}, "
            + ", ".join(f"{name}: {value}" for name, value in best.settings.items())
            + ". Engines that start beside this store use it; documents must be ingested behind that context."
        )
    elif any(each.status == "undecided" for each in verdicts):
        console.print(
            "[bold yellow]Undecided[/]: engines go on as without a verdict. Ask more questions: --minutes, --count."
        )
    else:
        console.print("[bold red]Refused[/]: engines that start beside this store prefill every request in full.")
    if json == "-":
        terminal.write_json(result, json)
    return 0 if best is not None else 1


def _resolved(engine: EngineOptions) -> BlendConfig:
    """The user's settings; the bundled reader's own system text stays, another model's is the application's."""
    # Every arm is measured, be it slower than plain vLLM.
    config = engine.resolve().replace(planner=False)
    own = BlendConfig.load(engine.config)
    return config.replace(system_prompt=own.system_prompt) if engine.model or own.model else config


def _questions(docs: str | None, questions: str | None, count: int) -> list[Question]:
    if questions is not None:
        return read_questions([questions], limit=count)
    return probes([document.content for document in load_documents(docs or BUNDLED)], count)


def _measured(
    config: BlendConfig,
    kind: str,
    questions: Sequence[Question],
    arms: Sequence[str],
    limits: Limits,
    seconds: float,
    *,
    verbose: bool,
) -> tuple[Measurement, list[Judged], dict[str, int], dict[str, Any]]:
    from kvblend_rag.demo.prompt import SYSTEM_PROMPT

    with tempfile.TemporaryDirectory(prefix="kvblend-calibrate-") as folder:
        arguments = {**config.engine_args, **engine_arguments()}
        own = config.replace(
            ingest_context=kind, store_path=folder, heed_verdict=False, enable_blending=True, engine_args=arguments
        )
        with started(own, verbose=verbose) as llm:
            engine = llm.kvblend.engine
            if engine.info.refusal is not None:
                raise ConfigError(f"{engine.info.model} can't be blended: {engine.info.refusal}.")
            render = renderer(engine, config.system_prompt or SYSTEM_PROMPT)
            asked = prepare(engine, questions, render)
            facts = engine_facts(engine.info, bool(config.engine_args.get("enforce_eager")))
            measured, rows = measure(
                llm.kvblend, asked, render, arms=arms, limits=limits, first=_FIRST, seconds=seconds, facts=facts
            )
            return measured, rows, _kinds([each.question for each in asked[: measured.questions]]), facts


def _tell(console: Console, measured: Measurement, verdict: Verdict, path: Path) -> None:
    colour = {"accepted": "green", "undecided": "yellow", "refused": "red"}[verdict.status]
    console.print(f"[{colour}]{verdict.status}[/]: {escape(verdict.reason)}.")
    if not verdict.risk.calibrated:
        console.print("Too few answers differed, or stayed the same, to fit the risk of a request: the default stays.")
    plot = save_plot(measured, verdict, path.with_suffix(".png"))
    console.print(f"Verdict: {escape(str(path))}" + (f"; plot: {escape(plot.name)}" if plot else ""))


def _auc(verdict: Verdict, rows: Sequence[Judged]) -> float | None:
    value = auc([verdict.risk.risk(each.signals) for each in rows], [each.differs for each in rows])
    return None if value != value else round(value, 3)


def _kinds(questions: Sequence[Question]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for question in questions:
        counts[question.kind] = counts.get(question.kind, 0) + 1
    return counts


def _table(measured: Measurement, verdict: Verdict) -> Table:
    title = f"{escape(verdict.model)} behind ingest_context: {verdict.context}, {measured.questions} questions"
    table = Table(title=title)
    for name in ("", "recomputed", "ΔNLL, nats a token", "KL, nats", "kept", "same answer"):
        table.add_column(name, justify="right" if name else "left")
    if not measured.questions:
        return table
    for cell in (*measured.cells, *measured.variations):
        mark = " ←" if verdict.accepted and dict(cell.settings) == verdict.settings else ""
        same = sum(cell.same) / len(cell.same)
        table.add_row(
            _name(cell) + mark,
            f"{cell.share:.0%}",
            _interval(cell.loss),
            _interval(cell.kl),
            f"{kept(cell, measured):.0%}",
            f"{same:.0%}",
        )
    return table


def _name(cell: Cell) -> str:
    settings = cell.settings
    if settings["selector"] == "none":
        return "reuse alone"
    name = f"{settings['selector']}, {settings['recompute_ratio']:.0%}"
    if settings["coverage"] < 1:
        name += f" at most, covering {settings['coverage']:.0%}"
    plain = BlendConfig()
    if settings["span_size"] != plain.span_size:
        name += f", spans of {settings['span_size']}"
    if settings["score_layers"] != plain.score_layers:
        name += f", layers: {settings['score_layers']}"
    if settings["carry"] != plain.carry:
        name += f", carry: {settings['carry']:g}"
    return name


def _interval(values: Sequence[float]) -> str:
    value, low, high = bootstrap.mean(np.asarray(values, dtype=np.float64)).to_list()
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


__all__ = ["CONTEXTS", "run"]
