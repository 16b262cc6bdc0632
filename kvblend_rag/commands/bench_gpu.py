"""``kvblend bench gpu``: TTFT of plain vLLM and of blending on a GPU, interleaved on one engine in one run.

Random weights of a real model's shape; random tokens; chunks in pinned host memory; the prefix cache is
reset before each arm, and TTFT counts from submission, loading included.
"""

from __future__ import annotations

import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvblend_rag.commands import bench_load
from kvblend_rag.commands.shapes import write_shape
from kvblend_rag.config import BlendConfig
from kvblend_rag.llm import LLM

if TYPE_CHECKING:
    from rich.table import Table

CHUNK_TOKENS = 1024
"""Of prompt for each chunk; the question's share comes out of it, so that chunks are of about 1,000 tokens."""

NOTHING = "nothing matches"
"""The arm whose prompts hold no stored chunk: what blending costs where it can't help."""

_QUESTION_TOKENS = 64

_INGESTED = 32
"""Chunks whose ingest is timed."""

_POPULATION = 128
"""Chunks from which prompts under load are drawn."""


def arms(spans: Sequence[int]) -> dict[str, dict[str, Any] | None]:
    """Options of each arm by name; None is a repeat of the prompt in the warm prefix cache."""
    named: dict[str, dict[str, Any] | None] = {"plain": {"blend": False}, "prefix hit": None, NOTHING: {}}
    named["reuse only"] = {"selector": "none"}
    for span in spans:
        named[f"first 10 %, spans of {span}"] = {"selector": "first", "ratio": 0.1, "span": span}
        named[f"question 10 %, spans of {span}"] = {"selector": "question", "ratio": 0.1, "span": span}
    return named


def run(
    shape: str = "llama-3.1-8b",
    lengths: Sequence[int] = (8192, 32768),
    spans: Sequence[int] = (64, 16),
    repeats: int = 10,
    timelines: Path | None = None,
    load_seconds: float = 0.0,
    **engine_args: Any,
) -> dict[str, Any]:
    """Measure; returns a JSON-able dictionary.

    Args:
        shape: a name in ``shapes.SHAPES``.
        lengths: prompt lengths, in tokens.
        spans: span lengths to compare.
        repeats: of each arm, in an order that is shuffled each time.
        timelines: folder for Chrome traces of one request of each kind, of the longest prompt.
        load_seconds: of each run under load (``bench_load``), with prompts of the shortest length; 0 for none.
        engine_args: any of vLLM's engine arguments.
    """
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        model = write_shape(shape, Path(folder) / shape)
        config = BlendConfig(
            store_path=str(Path(folder) / "store"), ingest_context="none", chunk_size=CHUNK_TOKENS, max_memory_gb=40.0
        )
        options = {
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "max_model_len": max(lengths) + 64,
            **engine_args,
        }
        started = time.perf_counter()
        with LLM(model, config=config, **options) as llm:
            start_seconds = time.perf_counter() - started
            results = {}
            ingest_rate, prefill_rate = _ingest_rates(llm, rng)
            for length in lengths:
                count = length // CHUNK_TOKENS
                size = (length - _QUESTION_TOKENS) // count
                chunks = [rng.integers(100, 100_000, size).astype(np.int32) for _ in range(count)]
                llm.kvblend.ingest(chunks)
                results[str(length)] = _measure(llm, chunks, length, arms(spans), repeats, rng)
            if timelines is not None:
                _trace(llm, chunks, max(lengths), arms(spans), timelines, rng)
            load = _under_load(llm, min(lengths), load_seconds, rng) if load_seconds else None
            info = llm.kvblend.engine.info
    return {
        "shape": shape,
        "engine_start_seconds": start_seconds,
        "ingest_tokens_per_second": ingest_rate,
        "prefill_tokens_per_second": prefill_rate,
        "results": results,
        "load": load,
        "engine": info.version,
        "dtype": info.dtype,
        "machine": _machine(),
        "command": " ".join(["kvblend", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
    }


def _ingest_rates(llm: LLM, rng: np.random.Generator) -> tuple[float, float]:
    """Tokens a second: of ingest, until all is durable, and of vLLM's own prefill of as many chunks."""
    engine = llm.kvblend.engine
    texts = [[rng.integers(100, 100_000, CHUNK_TOKENS).astype(np.int32) for _ in range(_INGESTED)] for _ in range(3)]
    llm.kvblend.ingest(texts[0][:8])  # warms up
    ingested = llm.kvblend.ingest(texts[1])
    started = time.perf_counter()
    llm.generate(texts[2], engine.one_token(), blend={"blend": False})
    return ingested.tokens / ingested.seconds, _INGESTED * CHUNK_TOKENS / (time.perf_counter() - started)


def _under_load(llm: LLM, length: int, seconds: float, rng: np.random.Generator) -> dict[str, Any]:
    count = length // CHUNK_TOKENS
    size = (length - _QUESTION_TOKENS) // count
    chunks = [rng.integers(100, 100_000, size).astype(np.int32) for _ in range(_POPULATION)]
    llm.kvblend.ingest(chunks)
    traffic = bench_load.Traffic(chunks, count, 100_000)
    return bench_load.run(llm, traffic, {"selector": "first", "ratio": 0.1, "span": 64}, seconds)


def table(result: dict[str, Any]) -> Table:
    """A row for each prompt length and arm."""
    from rich.table import Table  # here, since `tests/gpu/ttft.py` measures without it

    shown = Table(title=f"Time to first token, {result['shape']}, random weights, {result['machine']['gpu']}")
    for column in ("prompt", "", "median ms", "min–max ms", "× plain"):
        shown.add_column(column, justify="left" if not column else "right")
    for length, rows in result["results"].items():
        for name, row in rows.items():
            spread = f"{row['min_ms']:.0f}–{row['max_ms']:.0f}"
            shown.add_row(f"{int(length):,}", name, f"{row['median_ms']:.1f}", spread, f"{row['speedup']:.2f}")
    ingest, prefill = result["ingest_tokens_per_second"], result["prefill_tokens_per_second"]
    shown.caption = f"Ingest {ingest:,.0f} tokens a second, {ingest / prefill:.2f} of vLLM's own prefill."
    return shown


def _measure(
    llm: LLM,
    chunks: Sequence[Any],
    length: int,
    named: dict[str, dict[str, Any] | None],
    repeats: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    engine = llm.kvblend.engine
    one = engine.one_token()
    times: dict[str, list[float]] = {name: [] for name in named}
    steps: dict[str, dict[str, float]] = {}
    reports: dict[str, dict[str, int]] = {}
    for repeat in range(repeats + 1):
        for name in rng.permutation(list(named)):
            prompt = _prompt([] if name == NOTHING else chunks, length, rng)
            engine.run(engine.reset_prefix_cache())
            options = named[name]
            if options is None:
                options = {"blend": False}
                llm.generate(prompt, one, blend=options)
                prompt = np.concatenate([prompt[:-_QUESTION_TOKENS], rng.integers(100, 100_000, _QUESTION_TOKENS)])
            output = llm.generate(prompt, one, blend=options)[0]
            assert output.metrics is not None
            if repeat:  # the first round warms up
                times[name].append(output.metrics.ttft * 1e3)
                steps[name] = output.report.milliseconds
                reports[name] = {
                    group: getattr(output.report, group)
                    for group in ("cached_tokens", "reused_tokens", "recomputed_tokens", "computed_tokens")
                }
    plain = statistics.median(times["plain"])
    return {
        name: {
            "median_ms": statistics.median(taken),
            "min_ms": min(taken),
            "max_ms": max(taken),
            "speedup": plain / statistics.median(taken),
            "tokens": reports[name],
            "host_ms": steps[name],
        }
        for name, taken in times.items()
    }


def _prompt(chunks: Sequence[Any], length: int, rng: np.random.Generator) -> Any:
    """All chunks in a new order, and a new question."""
    body = np.concatenate([np.zeros(0, np.int32), *(chunks[i] for i in rng.permutation(len(chunks)))])
    return np.concatenate([body, rng.integers(100, 100_000, length - len(body))]).astype(np.int32)


def _trace(
    llm: LLM,
    chunks: Sequence[Any],
    length: int,
    named: dict[str, dict[str, Any] | None],
    folder: Path,
    rng: np.random.Generator,
) -> None:
    engine = llm.kvblend.engine
    for name, options in named.items():
        if options is None:
            continue
        engine.run(engine.reset_prefix_cache())
        engine.run(engine.call("start_trace"))
        llm.generate(_prompt(chunks, length, rng), engine.one_token(), blend=options)
        file = "".join(letter if letter.isalnum() else "-" for letter in name)
        engine.run(engine.call("stop_trace", str(folder / f"{file}.json")))


def _machine() -> dict[str, Any]:
    import torch

    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


__all__ = ["CHUNK_TOKENS", "NOTHING", "arms", "run", "table"]
