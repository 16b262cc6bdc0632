"""``kvblend demo``: documents ingested, retrieved, blended and answered, beside plain vLLM on the same engine."""

from __future__ import annotations

import contextlib
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from kvblend_rag.commands import terminal
from kvblend_rag.commands.arms import Arms, greedy, seconds
from kvblend_rag.commands.machine import engine_facts, machine
from kvblend_rag.commands.session import EngineOptions, check_writable, started
from kvblend_rag.config import BlendConfig
from kvblend_rag.demo.library import BUNDLED, Document, load_documents
from kvblend_rag.demo.prompt import messages
from kvblend_rag.demo.questions import Question, load_questions
from kvblend_rag.demo.score import is_right
from kvblend_rag.errors import ConfigError

if TYPE_CHECKING:
    from kvblend_rag.output import RequestOutput

_MAX_TOKENS = 32
_MARK = {True: "[green]✓[/]", False: "[red]✗[/]", None: ""}


@dataclass(frozen=True)
class Asked:
    """One question, answered in both ways."""

    question: str
    expected: tuple[str, ...]
    sources: tuple[str, ...]
    plain: RequestOutput
    blended: RequestOutput

    @property
    def ratio(self) -> float:
        """How many times sooner the blended answer began."""
        return seconds(self.plain) / seconds(self.blended)

    @property
    def same(self) -> bool:
        """Whether both gave the same text."""
        return _text(self.plain) == _text(self.blended)

    def right(self, output: RequestOutput) -> bool | None:
        """Whether an answer is as expected; None where nobody knows."""
        return is_right(_text(output), self.expected) if self.expected else None

    def to_dict(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return {
            "question": self.question,
            "expected": list(self.expected),
            "sources": list(self.sources),
            "ratio": self.ratio,
            "same": self.same,
            **{
                name: {"answer": _text(each), "right": self.right(each), "ttft_seconds": seconds(each)}
                for name, each in (("plain", self.plain), ("blended", self.blended))
            },
            "report": self.blended.report.to_dict(),
        }


def run(
    *,
    engine: EngineOptions,
    docs: str | None = None,
    questions: int = 12,
    ask: Sequence[str] | None = None,
    k: int = 6,
    seed: int = 0,
    json: str | None = None,
) -> int:
    """Show the main job on real input.

    Args:
        engine: model and store; the bundled reader, and a store of the demo's own, when not given.
        docs: folder of text or Markdown; Fennick's documents when not given.
        questions: how many of the bundled questions are asked.
        ask: questions of the user's own.
        k: documents a prompt.
        seed: of the order of the arms.
        json: where to write everything as JSON.

    Raises:
        KVBlendError: nothing to read, no engine, or a store that can't be written.
    """
    console = terminal.prose(json)
    documents = load_documents(docs or BUNDLED)
    asked = _questions(documents, docs is not None, questions, ask)
    store = str(Path(BlendConfig().store_path).with_name("demo-store"))
    facts: dict[str, Any] = {"machine": machine()}
    config = engine.resolve(store_path=store)
    check_writable(config)
    from kvblend_rag.demo.retriever import Retriever

    retriever = Retriever(documents)
    _introduce(console, documents, asked, config)
    with started(config, verbose=engine.verbose) as llm:
        facts["engine"] = engine_facts(llm.kvblend.engine.info, bool(config.engine_args.get("enforce_eager")))
        ingested = llm.kvblend.replace(
            [document.content for document in documents],
            document_ids=[document.id for document in documents],
            progress=console.is_terminal,
        )
        console.print(f"Ingested: {ingested}.")
        arms = Arms(llm)
        with console.status("One request in each way to warm up, not measured"):
            arms.warm_up(llm.render(messages("What is this about?", documents[:k])))
        order = random.Random(seed)
        answers: list[Asked] = []
        with _live(console) as show:
            for question in asked:
                found = retriever.search(question.question, k)
                prompt = llm.render(messages(question.question, found))
                ways: list[tuple[str, dict[str, Any]]] = [("plain", {"blend": False}), ("blended", {})]
                order.shuffle(ways)
                got = {name: arms.ask(prompt, greedy(_MAX_TOKENS), **options) for name, options in ways}
                sources = tuple(document.id for document in found)
                answers.append(Asked(question.question, question.answers, sources, **got))
                show(answers)
    _conclude(console, answers, config)
    result = {**facts, "settings": {"selector": config.selector, "ratio": config.recompute_ratio, "k": k, "seed": seed}}
    terminal.write_json({**result, "questions": [each.to_dict() for each in answers]}, json)
    return 0


def _questions(documents: Sequence[Document], own: bool, count: int, ask: Sequence[str] | None) -> list[Question]:
    if count < 1:
        raise ConfigError(f"--questions is {count}, and must be 1 or more.")
    if ask:
        return [Question(each, (), ()) for each in ask]
    if own:
        # Nobody knows what is in them: ask about the titles, and compare the two answers with one another.
        titles = list(dict.fromkeys(document.title for document in documents))
        return [Question(f"What do the documents say about {each}?", (), ()) for each in _spread(titles, count)]
    return _spread(load_questions(), count)


def _spread(items: list[Any], count: int) -> list[Any]:
    """``count`` of them, evenly from first to last."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _introduce(
    console: Console, documents: Sequence[Document], questions: Sequence[Question], config: BlendConfig
) -> None:
    console.rule("kvblend demo")
    console.print(
        f"{len(documents)} documents, embedded with wordllama, found with FAISS. {len(questions)} questions, each "
        "asked twice of one vLLM engine, in random order: as plain vLLM (prefix caching on), and with the stored KV "
        f"of the retrieved documents blended (selector {config.selector}, {config.recompute_ratio:.0%} recomputed). "
        "Before each, the prefix cache is emptied and warmed with the system prompt alone; time runs from "
        "submission to the first token, loading included."
    )


@contextlib.contextmanager
def _live(console: Console) -> Iterator[Any]:
    """Yields what shows the answers so far: a growing table, or, where nothing can be redrawn, line by line."""
    if not console.is_terminal:

        def line(answers: Sequence[Asked]) -> None:
            last = answers[-1]
            console.print(
                f"{len(answers):>3}. {escape(last.question)}  plain {seconds(last.plain):.2f} s, "
                f"blended {seconds(last.blended):.2f} s, {last.ratio:.1f}×"
            )

        yield line
        return
    with Live(_table([]), console=console, auto_refresh=False, vertical_overflow="visible") as live:
        yield lambda answers: live.update(_table(answers), refresh=True)


def _table(answers: Sequence[Asked]) -> Table:
    table = Table(show_lines=True)
    table.add_column("question → expected", ratio=4)
    table.add_column("prompt tokens", justify="right")
    table.add_column("reused\nrecomputed\ncomputed", justify="right")
    table.add_column("first token\nplain\nblended", justify="right")
    table.add_column("plain vLLM answers\nblended answers", ratio=3)
    table.add_column("right", justify="center")
    table.add_column("same", justify="center")
    for each in answers:
        report = each.blended.report
        expected = f"\n[dim]→ {escape(each.expected[0])}[/]" if each.expected else ""
        cached = f"\n[dim]{report.cached_tokens:,} cached[/]" if report.cached_tokens else ""
        why = f"\n[yellow]{escape(report.reason)}[/]" if report.reason else ""
        table.add_row(
            escape(each.question) + expected,
            f"{report.prompt_tokens:,}",
            f"{report.reused_tokens:,}\n{report.recomputed_tokens:,}\n{report.computed_tokens:,}{cached}",
            f"{seconds(each.plain):.2f} s\n{seconds(each.blended):.2f} s\n[bold]{each.ratio:.1f}×[/]",
            f"{escape(_text(each.plain))}\n[green]{escape(_text(each.blended))}[/]{why}",
            f"{_MARK[each.right(each.plain)]}\n{_MARK[each.right(each.blended)]}",
            "yes" if each.same else "[yellow]no[/]",
        )
    return table


def _speed(ratios: Sequence[float]) -> str:
    """How many times sooner the first token came, or how many times later."""
    way = "sooner" if statistics.median(ratios) >= 1 else "later"
    times = sorted(ratios if way == "sooner" else [1 / ratio for ratio in ratios])
    return f"[bold]First token {statistics.median(times):.1f}× {way}[/] (median; {times[0]:.1f}× to {times[-1]:.1f}×)"


def _conclude(console: Console, answers: Sequence[Asked], config: BlendConfig) -> None:
    if not console.is_terminal:
        console.print(_table(answers))
    plain, blended = (
        statistics.median(seconds(getattr(each, way)) for each in answers) for way in ("plain", "blended")
    )
    console.print(f"{_speed([each.ratio for each in answers])}: {plain:.2f} s plain, {blended:.2f} s blended.")
    same = sum(each.same for each in answers)
    judged = [each for each in answers if each.expected]
    if judged:
        right = [sum(bool(each.right(getattr(each, way))) for each in judged) for way in ("plain", "blended")]
        console.print(
            f"Right: {right[0]} of {len(judged)} plain, {right[1]} of {len(judged)} blended. "
            f"The same answer: {same} of {len(answers)}."
        )
    else:
        console.print(f"The same answer: {same} of {len(answers)}.")
    console.print(
        f"\nThe store is in {config.store_path}; a second run computes nothing again.\n"
        "Next: [bold]kvblend demo --docs DIR[/] or [bold]--model DIR|NAME[/] for your own; "
        '[bold]kvblend ingest DIR[/] and [bold]kvblend ask "…"[/];\n'
        "      [bold]kvblend verify --model …[/] for exactness, [bold]kvblend bench ttft[/] for speed; "
        "from Python: examples/kv_blend.py and README.md."
    )


def _text(output: RequestOutput) -> str:
    return output.outputs[0].text.strip()


__all__ = ["Asked", "run"]
