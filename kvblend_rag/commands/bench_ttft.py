"""Time to first token: plain vLLM and blending, interleaved on one engine in one run.

Each repeat asks a prompt of its own in every way, in random order; before each the prefix cache is emptied
and warmed with the system prompt alone. "Plain" is a request for which blending is switched off, on the
same engine: vLLM as it ships, with its prefix caching, chunked prefill and compilation.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from kvblend_rag.commands.arms import Arms, greedy, seconds, spread
from kvblend_rag.demo.library import Document, load_documents
from kvblend_rag.demo.prompt import messages
from kvblend_rag.demo.questions import load_questions
from kvblend_rag.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from kvblend_rag.llm import LLM
    from kvblend_rag.output import RequestOutput

_BOOKKEEPING = ("match", "plan", "select")
_WARM_UPS = 2


def run(
    llm: LLM,
    *,
    prompt_tokens: int = 2000,
    ratio: float = 0.15,
    span: int | None = None,
    selectors: Sequence[str] = ("first", "question", "none"),
    repeats: int = 7,
    seed: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure.

    Args:
        llm: the engine; the bundled documents are ingested into its store.
        prompt_tokens: about how long a prompt is.
        ratio: share of the reused tokens that is recomputed.
        span: length of recomputed spans; the configured one when not given.
        selectors: what is compared with plain vLLM.
        repeats: prompts, each asked in every way.
        seed: of the prompts and of the order.
        console: where a progress bar is drawn.

    Returns:
        JSON-able: ``settings``, and in ``rows`` for each way the seconds, the ratio to plain vLLM, and the
        milliseconds of each step.

    Raises:
        ConfigError: a setting that can't be used, or a prompt longer than the context.
    """
    if repeats < 1:
        raise ConfigError(f"The number of repeats is {repeats}, and must be 1 or more.")
    room = llm.kvblend.engine.info.max_model_len - 8
    if prompt_tokens > room:
        raise ConfigError(f"A prompt of {prompt_tokens} tokens does not fit: the context has room for {room}.")
    documents = load_documents()
    llm.kvblend.ingest([document.content for document in documents], progress=False)
    blending: dict[str, Any] = {"ratio": ratio, **({"span": span} if span else {})}
    ways: dict[str, dict[str, Any]] = {name: {"selector": name, **blending} for name in selectors}
    draw = random.Random(seed)
    arms = Arms(llm)
    known: dict[str, list[RequestOutput]] = {"plain": [], **{name: [] for name in ways}}
    unknown: dict[str, list[RequestOutput]] = {"plain": [], "blended": []}
    for options in ({"blend": False}, *ways.values()):
        for _ in range(_WARM_UPS):
            arms.ask(_prompt(llm, documents, prompt_tokens, draw), greedy(1), **options)
    with Progress(console=console, disable=console is None, transient=True) as bar:
        task = bar.add_task("Measuring", total=repeats * (len(known) + len(unknown)))
        for _ in range(repeats):
            prompt = _prompt(llm, documents, prompt_tokens, draw)
            foreign = _shuffled(llm, prompt, draw)
            requests: list[tuple[dict[str, list[RequestOutput]], str, list[int], dict[str, Any]]] = [
                (known, "plain", prompt, {"blend": False}),
                *((known, name, prompt, options) for name, options in ways.items()),
                (unknown, "plain", foreign, {"blend": False}),
                (unknown, "blended", foreign, {}),
            ]
            draw.shuffle(requests)
            for group, name, tokens, options in requests:
                group[name].append(arms.ask(tokens, greedy(1), **options))
                bar.advance(task)
    rows = [
        _row(f"{name}, {ratio:.0%}" if name not in ("none",) else name, known[name], known["plain"]) for name in ways
    ]
    return {
        "settings": {
            "prompt_tokens": prompt_tokens,
            "ratio": ratio,
            "span": span or llm.kvblend.config.span_size,
            "repeats": repeats,
            "seed": seed,
            "documents": len(documents),
        },
        "rows": [
            _row("plain vLLM", known["plain"], known["plain"]),
            *rows,
            _row("plain vLLM, unknown text", unknown["plain"], unknown["plain"]),
            _row("nothing matches", unknown["blended"], unknown["plain"]),
        ],
    }


def table(result: dict[str, Any]) -> Group:
    """What ``run`` returned, to be printed."""
    settings = result["settings"]
    shown = Table(
        title=f"Time to first token, about {settings['prompt_tokens']:,} prompt tokens, {settings['repeats']} repeats",
        caption="Medians over the repeats. Plain: blending switched off for the request, on the same engine.",
    )
    for name in ("", "prompt", "reused + recomputed + computed", "median s", "min–max s", "× plain", "of plain"):
        shown.add_column(name, justify="right" if name else "left", no_wrap=True)
    steps = []
    for row in result["rows"]:
        time = row["seconds"]
        groups = " + ".join(f"{row[f'{name}_tokens']:,.0f}" for name in ("reused", "recomputed", "computed"))
        shown.add_row(
            row["name"],
            f"{row['prompt_tokens']:,.0f}",
            groups,
            f"{time['median']:.3f}",
            f"{time['min']:.3f}–{time['max']:.3f}",
            f"{row['speedup']['median']:.2f}",
            f"{row['share_of_plain']:.3f}",
        )
        parts = ", ".join(f"{name} {value:.1f}" for name, value in row["milliseconds"].items())
        if parts:
            spans = f"; {row['spans']:.0f} spans" if row["spans"] else ""
            kept = f"bookkeeping {row['bookkeeping_ms']:.1f} ms"
            steps.append(Text(f"{row['name']}: {kept}; steps in ms: {parts}{spans}", "dim"))
    return Group(shown, *steps)


def _row(name: str, outputs: Sequence[RequestOutput], plain: Sequence[RequestOutput]) -> dict[str, Any]:
    reports = [output.report for output in outputs]
    pairs = list(zip(outputs, plain, strict=True))
    steps = list(dict.fromkeys(step for report in reports for step in report.milliseconds))
    milliseconds = {step: statistics.median(report.milliseconds.get(step, 0.0) for report in reports) for step in steps}
    tokens = {
        f"{group}_tokens": statistics.median(getattr(report, f"{group}_tokens") for report in reports)
        for group in ("prompt", "cached", "reused", "recomputed", "computed", "scored")
    }
    return {
        "name": name,
        **tokens,
        "spans": statistics.median(len(report.recomputed_spans) for report in reports),
        "seconds": spread(seconds(output) for output in outputs),
        "speedup": spread(seconds(other) / seconds(output) for output, other in pairs),
        "share_of_plain": statistics.median(seconds(output) / seconds(other) for output, other in pairs),
        "bookkeeping_ms": sum(milliseconds.get(step, 0.0) for step in _BOOKKEEPING),
        "milliseconds": milliseconds,
        "all_seconds": [seconds(output) for output in outputs],
    }


def _prompt(llm: LLM, documents: Sequence[Document], tokens: int, draw: random.Random) -> list[int]:
    """Whole documents in random order in front of a question, as near to the length as they come."""
    question = draw.choice(load_questions()).question
    order = draw.sample(list(documents), len(documents))
    empty = len(llm.render(messages(question, [])))
    lengths = [len(llm.get_tokenizer().encode(each.content + "\n\n", add_special_tokens=False)) for each in order]
    chosen: list[Document] = []
    room = tokens - empty
    for document, length in zip(order, lengths, strict=True):
        if length <= room:
            chosen.append(document)
            room -= length
    return llm.render(messages(question, chosen))


def _shuffled(llm: LLM, prompt: Sequence[int], draw: random.Random) -> list[int]:
    """The prompt's tokens in an order that no document has; of the same length."""
    return draw.sample(list(prompt), len(prompt))


__all__ = ["run", "table"]
