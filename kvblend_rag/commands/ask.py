"""``kvblend ask "question"``: retrieve, blend, answer, and say what happened."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from kvblend_rag.commands import terminal
from kvblend_rag.commands.arms import Arms, greedy
from kvblend_rag.commands.library_index import load_index
from kvblend_rag.commands.session import EngineOptions, started
from kvblend_rag.demo.prompt import messages

if TYPE_CHECKING:
    from kvblend_rag.output import RequestOutput


def run(
    questions: Sequence[str],
    *,
    engine: EngineOptions,
    k: int = 5,
    plain: bool = False,
    max_tokens: int = 128,
    json: str | None = None,
) -> int:
    """Answer questions from the ingested documents.

    Args:
        questions: none reads them from standard input, one a line.
        engine: model and store.
        k: documents a prompt, the best one first.
        plain: ask plain vLLM as well.
        max_tokens: longest answer.
        json: where to write the answers as JSON.

    Raises:
        KVBlendError: nothing was ingested, no engine, or a prompt that is too long.
    """
    config = engine.resolve()
    retriever = load_index(config)
    found = {question: retriever.search(question, k) for question in questions}
    console = terminal.prose(json)
    results: list[dict[str, Any]] = []
    with started(config, verbose=engine.verbose) as llm:
        arms = Arms(llm)
        if plain:
            arms.warm_up(llm.render(messages("?", retriever.documents[:3])))
        for question in questions or _typed(console):
            documents = found.get(question) or retriever.search(question, k)
            prompt = llm.render(messages(question, documents))
            sampling = greedy(max_tokens)
            ordinary = arms.ask(prompt, sampling, blend=False) if plain else None
            blended = arms.ask(prompt, sampling) if plain else llm.generate([prompt], sampling)[0]
            _print(console, question, blended, ordinary)
            console.print("Sources: " + escape(" · ".join(document.id for document in documents)), style="dim")
            results.append(
                {
                    "question": question,
                    "answer": blended.outputs[0].text.strip(),
                    "ttft_seconds": blended.metrics.ttft if blended.metrics else None,
                    "plain": None
                    if ordinary is None or ordinary.metrics is None
                    else {"answer": ordinary.outputs[0].text.strip(), "ttft_seconds": ordinary.metrics.ttft},
                    "sources": [document.id for document in documents],
                    "report": blended.report.to_dict(),
                }
            )
    terminal.write_json(results, json)
    return 0


def _typed(console: Console) -> Iterator[str]:
    """Questions from the keyboard or a pipe, until it ends or a line is empty."""
    while True:
        if sys.stdin.isatty():
            console.print("[bold]Question[/] (empty to end): ", end="")
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def _print(console: Console, question: str, blended: RequestOutput, ordinary: RequestOutput | None) -> None:
    console.print()
    console.print(f"[bold]{escape(question)}[/]")
    console.print(escape(blended.outputs[0].text.strip()), style="green")
    console.print(blended.report)
    assert blended.metrics is not None
    line = f"First token after {blended.metrics.ttft:.2f} s"
    if ordinary is not None and ordinary.metrics is not None:
        line += f"; plain vLLM {ordinary.metrics.ttft:.2f} s, {ordinary.metrics.ttft / blended.metrics.ttft:.1f}×"
        same = ordinary.outputs[0].text.strip() == blended.outputs[0].text.strip()
        line += ", the same answer." if same else f", and answers: {escape(ordinary.outputs[0].text.strip())}"
    console.print(line)


__all__ = ["run"]
