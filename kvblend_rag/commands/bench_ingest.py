"""Ingest against vLLM's own prefill of the same chunks, interleaved on one engine in one run.

Both compute every chunk behind the ingest context, whose own KV is a prefix-cache hit for all but the
first, with as many requests at once; ingest also copies the KV out, writes it to disk and waits until it
is durable. The rate counts the chunks' tokens only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from kvblend_rag.commands.arms import spread
from kvblend_rag.demo.library import load_documents
from kvblend_rag.errors import ConfigError

if TYPE_CHECKING:
    from kvblend_rag.llm import LLM

_AT_ONCE = 64
_DOCUMENT = "kvblend-bench"


def run(llm: LLM, *, repeats: int = 3) -> dict[str, Any]:
    """Measure; what is ingested is deleted again.

    Args:
        llm: an engine with a store of its own.
        repeats: of each way, alternating.

    Returns:
        JSON-able: the number of chunks and tokens, tokens per second of each way, and the ratio.

    Raises:
        ConfigError: no repeats.
        StoreError: the store can't be written.
    """
    if repeats < 1:
        raise ConfigError(f"The number of repeats is {repeats}, and must be 1 or more.")
    texts = [document.content for document in load_documents()]
    kv = llm.kvblend
    chunks = list({key: tokens.tolist() for text in texts for key, tokens in kv.cut(text)}.values())
    tokens = sum(map(len, chunks))
    context = list(kv.engine.info.context)
    rates: dict[str, list[float]] = {"ingest": [], "prefill": [], "prefill without context": []}

    def ingest() -> float:
        return kv.ingest(texts, document_ids=[_DOCUMENT] * len(texts), progress=False).seconds

    rounds: dict[str, Callable[[], float]] = {
        "prefill": lambda: _prefill(llm, [[*context, *chunk] for chunk in chunks]),
        "ingest": ingest,
        "prefill without context": lambda: _prefill(llm, chunks),
    }
    for repeat in range(repeats + 1):
        for name, timed in rounds.items():
            kv.release([_DOCUMENT])
            kv.engine.run(kv.engine.reset_prefix_cache())
            took = timed()
            if repeat:  # the first round warms up
                rates[name].append(tokens / took)
    kv.release([_DOCUMENT])
    summary = {name: spread(values) for name, values in rates.items()}
    return {
        "settings": {"repeats": repeats, "chunks": len(chunks), "tokens": tokens, "context_tokens": len(context)},
        "tokens_per_second": summary,
        "ingest_over_prefill": spread(a / b for a, b in zip(rates["ingest"], rates["prefill"], strict=True)),
        "ingest_over_prefill_without_context": spread(
            a / b for a, b in zip(rates["ingest"], rates["prefill without context"], strict=True)
        ),
    }


def table(result: dict[str, Any]) -> Table:
    """What ``run`` returned, to be printed."""
    settings = result["settings"]
    shown = Table(
        title=f"{settings['chunks']} chunks of {settings['tokens']:,} tokens behind {settings['context_tokens']} of "
        f"context, {settings['repeats']} repeats"
    )
    for name in ("", "tokens/s", "min–max", "ingest is"):
        shown.add_column(name, justify="left" if not name else "right")
    shares = {
        "prefill": result["ingest_over_prefill"],
        "prefill without context": result["ingest_over_prefill_without_context"],
    }
    for name, rate in result["tokens_per_second"].items():
        share = f"{shares[name]['median']:.0%} of it" if name in shares else ""
        shown.add_row(name, f"{rate['median']:,.0f}", f"{rate['min']:,.0f}–{rate['max']:,.0f}", share)
    return shown


def _prefill(llm: LLM, prompts: Sequence[Sequence[int]]) -> float:
    """Seconds that plain vLLM takes for these prompts."""
    engine = llm.kvblend.engine

    async def all_of_them() -> float:
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(prompt: Sequence[int]) -> None:
            async with gate:
                async for _ in engine.generate(list(prompt), engine.one_token(), options={"blend": False}):
                    pass

        started = time.perf_counter()
        await asyncio.gather(*map(one, prompts))
        return time.perf_counter() - started

    return engine.run(all_of_them())


__all__ = ["run", "table"]
