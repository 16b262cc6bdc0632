"""``kvblend eval``: what blending keeps of the answers to the user's questions, against a full prefill."""

from __future__ import annotations

import random
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from kvblend_rag.commands import terminal
from kvblend_rag.commands.arms import Arms, seconds, spread
from kvblend_rag.commands.machine import engine_facts, machine
from kvblend_rag.commands.session import EngineOptions, started
from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import ConfigError
from kvblend_rag.quality import markdown, plot
from kvblend_rag.quality.aggregate import aggregate_questions
from kvblend_rag.quality.arms import DEFAULT, Arm, by_context, parse_arms
from kvblend_rag.quality.forcing import engine_arguments
from kvblend_rag.quality.observe import Asked, Observations, observe, prepare
from kvblend_rag.quality.prompt import renderer
from kvblend_rag.quality.questions import Question, read_questions
from kvblend_rag.quality.score import Sample, score_all
from kvblend_rag.quality.summary import ALL, summarise
from kvblend_rag.quality.two_chunk import two_chunk_questions

if TYPE_CHECKING:
    from kvblend_rag.llm import LLM

LONGEST_DOCUMENT = 2048
"""Tokens up to which a question's document is one chunk."""


@dataclass
class _Measured:
    """What the engines gave, one after another."""

    asked: list[Asked] = field(default_factory=list)
    observed: Observations = field(default_factory=dict)
    ttft: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def run(
    *,
    engine: EngineOptions,
    files: Sequence[str] = (),
    two_chunk: int = 0,
    aggregate: int = 0,
    arms: Sequence[str] | None = None,
    limit: int | None = None,
    chunks: int | None = None,
    batch: int = 16,
    timed: int = 5,
    minutes: float | None = None,
    json: str | None = None,
    markdown_file: str | None = None,
    plot_file: str | None = None,
) -> int:
    """Ask every question in every way, and say how far the answers are from a full prefill's.

    Args:
        engine: model; the store is a temporary one unless named.
        files: of questions, or folders of such.
        two_chunk: so many questions made here are asked as well, two in three of which need two chunks.
        aggregate: so many more, half of which need every document.
        arms: see ``quality.arms``.
        limit: at most so many questions of each file.
        chunks: at most so many documents a question.
        batch: questions whose chunks are stored at a time.
        timed: questions on which the time to first token is measured, one request at a time.
        minutes: about how long to go on asking; questions that are left then are not asked.
        json: where to write the result.
        markdown_file: where to write the tables.
        plot_file: where to draw quality against cost.

    Raises:
        KVBlendError: a file, arm or model that can't be used, or no engine.
    """
    for name, value in (("limit", limit), ("chunks", chunks), ("batch", batch)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name} is {value}, and must be 1 or more.")
    if minutes is not None and minutes <= 0:
        raise ConfigError(f"--minutes is {minutes:g}, and must be more than 0.")
    if timed < 0 or not all(0 <= each <= 10_000 for each in (two_chunk, aggregate)):
        raise ConfigError("--timed, --two-chunk and --aggregate take numbers from 0 on.")
    console = terminal.prose(json)
    before = machine()
    config = engine.resolve(chunk_size=LONGEST_DOCUMENT).replace(planner=False)
    ways = parse_arms(arms or DEFAULT, config)
    made = two_chunk_questions(two_chunk) + aggregate_questions(aggregate)
    questions = (read_questions(files, limit=limit, documents=chunks) if files or not made else []) + made
    # So that those left out for want of time are of all files and kinds.
    random.Random(0).shuffle(questions)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="kvblend-eval-") as folder:
        if engine.store is None:
            config = config.replace(store_path=folder)
        measured = _measure(config, questions, ways, batch, timed, minutes, verbose=engine.verbose)
    asked = [each.question for each in measured.asked][: min(map(len, measured.observed.values()))]
    (plain,) = (arm.name for arm in ways if arm.plain)
    samples = score_all(asked, measured.observed, measured.observed[plain])
    result: dict[str, Any] = {
        "command": shlex.join(["kvblend", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.perf_counter() - begun, 1),
        "machine": before,
        "engine": measured.facts,
        "settings": {
            "ingest_context": config.ingest_context,
            "span_size": config.span_size,
            "encoding": config.encoding,
            "questions": len(asked),
            "too_long": len(questions) - len(measured.asked),
            "no_time": len(measured.asked) - len(asked),
        },
        "arms": {arm.name: {"options": dict(arm.options), "context": arm.context} for arm in ways},
        "groups": summarise(asked, ways, samples),
        "ttft": measured.ttft,
        "samples": _rows(asked, samples),
    }
    for group in result["groups"]:
        console.print(_table(result["groups"], group))
    console.print(_advice(result))
    terminal.write_json(result, json)
    if markdown_file is not None:
        _write(markdown.document(result), markdown_file)
    if plot_file is not None:
        plot.save_plot(result, plot_file)
    return 0


def _measure(
    config: BlendConfig,
    questions: Sequence[Question],
    ways: Sequence[Arm],
    batch: int,
    timed: int,
    minutes: float | None,
    *,
    verbose: bool,
) -> _Measured:
    """One engine after another, each with an ingest context of its own."""
    from kvblend_rag.demo.prompt import SYSTEM_PROMPT

    measured = _Measured()
    arguments = {**config.engine_args, **engine_arguments()}
    contexts = by_context(ways, config)
    for context, several in contexts.items():
        limit = None if minutes is None else 60 * minutes * len(several) / len(ways)
        own = config.replace(ingest_context=context, engine_args=arguments)
        with started(own, verbose=verbose) as llm:
            kvblend = llm.kvblend
            if not measured.asked:
                render = renderer(kvblend.engine, config.system_prompt or SYSTEM_PROMPT)
                measured.asked = prepare(kvblend.engine, questions, render)
                measured.facts = engine_facts(kvblend.engine.info, bool(config.engine_args.get("enforce_eager")))
                if not measured.asked:
                    raise ConfigError(
                        f"None of the {len(questions)} questions fits into the model's context of "
                        f"{kvblend.engine.info.max_model_len} tokens: ask with fewer --chunks."
                    )
            measured.observed |= observe(kvblend, measured.asked, several, batch=batch, seconds=limit)
            measured.ttft |= _times(llm, measured.asked[:timed], several)
    return measured


def _times(llm: LLM, asked: Sequence[Asked], ways: Sequence[Arm]) -> dict[str, Any]:
    """Seconds to the first token and plain vLLM's seconds over them, one request at a time on this engine."""
    if not asked:
        return {}
    documents = [document for each in asked for document in each.question.documents]
    llm.kvblend.ingest(documents, document_ids=["timed"] * len(documents), progress=False)
    alone, one = Arms(llm), llm.kvblend.engine.one_token()
    known: dict[str, list[float]] = {}
    plain: list[float] = []
    options = {arm.name: dict(arm.options) for arm in ways}
    alone.warm_up(asked[0].prompt, *options.values())
    for each in asked:
        plain.append(seconds(alone.ask(each.prompt, one, blend=False)))
        for name, option in options.items():
            taken = plain[-1] if option.get("blend") is False else seconds(alone.ask(each.prompt, one, **option))
            known.setdefault(name, []).append(taken)
    llm.kvblend.release(["timed"])
    return {
        name: {
            "seconds": spread(taken),
            "speedup": spread(whole / own for whole, own in zip(plain, taken, strict=True)),
        }
        for name, taken in known.items()
    }


def _rows(asked: Sequence[Question], samples: Mapping[str, Sequence[Sample]]) -> list[dict[str, Any]]:
    """Every question's numbers, without its text: data sets have licences of their own."""
    return [
        {
            "id": question.id,
            "set": question.set,
            "kind": question.kind,
            "arms": {
                name: {key: round(value, 5) for key, value in asdict(several[place]).items() if value == value}
                for name, several in samples.items()
            },
        }
        for place, question in enumerate(asked)
    ]


def _table(groups: Mapping[str, Any], group: str) -> Table:
    table = Table(title=f"{group}, {groups[group]['questions']} questions")
    table.add_column("")
    for _, heading, _ in markdown.COLUMNS:
        table.add_column(heading, justify="right")
    for arm, row in groups[group]["arms"].items():
        wide = group == ALL
        cells = (
            markdown.cell(row.get(name), form, interval=wide and name in ("f1_share", "nll_change", "kl"))
            for name, _, form in markdown.COLUMNS
        )
        table.add_row(arm, *cells)
    return table


def _advice(result: Mapping[str, Any]) -> str:
    settings = result["settings"]
    lines = [
        "ΔNLL: nats a token by which the gold answer is less likely than after a full prefill. KL: nats, to the full "
        "prefill's next-token distributions over the gold answer. In brackets: 95 % paired bootstrap intervals."
    ]
    if settings["too_long"]:
        lines.append(f"{settings['too_long']} questions did not fit into the context and were not asked.")
    if settings["no_time"]:
        lines.append(f"{settings['no_time']} questions were not asked for want of time.")
    if result["ttft"]:
        medians = ((name, each["speedup"]["median"]) for name, each in result["ttft"].items())
        lines.append("Time to first token, times sooner than plain: " + ", ".join(f"{n} {v:.2f}" for n, v in medians))
    unblended = {
        name: row["blended"][0]
        for name, row in result["groups"][ALL]["arms"].items()
        if row["blended"][0] < 1 and result["arms"][name]["options"].get("blend", True)
    }
    if unblended:
        lines.append("Blended: " + ", ".join(f"{name} {share:.0%}" for name, share in unblended.items()))
    return "\n".join(lines)


def _write(text: str, target: str) -> None:
    try:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{target} can't be written: {error.strerror}.") from error


__all__ = ["LONGEST_DOCUMENT", "run"]
