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
from typing import Any

import numpy as np

from kvblend_rag.commands.shapes import write_shape
from kvblend_rag.config import BlendConfig
from kvblend_rag.llm import LLM

CHUNK_TOKENS = 1024
"""Of prompt for each chunk; the question's share comes out of it, so that chunks are of about 1,000 tokens."""

_QUESTION_TOKENS = 64


def arms(spans: Sequence[int]) -> dict[str, dict[str, Any] | None]:
    """Options of each arm by name; None is a repeat of the prompt in the warm prefix cache."""
    named: dict[str, dict[str, Any] | None] = {"plain": {"blend": False}, "prefix hit": None}
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
    **engine_args: Any,
) -> dict[str, Any]:
    """Measure; returns a JSON-able dictionary.

    Args:
        shape: a name in ``shapes.SHAPES``.
        lengths: prompt lengths, in tokens.
        spans: span lengths to compare.
        repeats: of each arm, in an order that is shuffled each time.
        timelines: folder for Chrome traces of one request of each kind, of the longest prompt.
        engine_args: any of vLLM's engine arguments.
    """
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        model = write_shape(shape, Path(folder) / shape)
        config = BlendConfig(
            store_path=str(Path(folder) / "store"), ingest_context="none", chunk_size=CHUNK_TOKENS, max_memory_gb=24.0
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
            results, rates = {}, []
            for length in lengths:
                count = length // CHUNK_TOKENS
                size = (length - _QUESTION_TOKENS) // count
                chunks = [rng.integers(100, 100_000, size).astype(np.int32) for _ in range(count)]
                ingested = llm.kvblend.ingest(chunks)
                rates.append(ingested.tokens / ingested.seconds)
                results[str(length)] = _measure(llm, chunks, length, arms(spans), repeats, rng)
            if timelines is not None:
                _trace(llm, chunks, max(lengths), arms(spans), timelines, rng)
            info = llm.kvblend.engine.info
    return {
        "shape": shape,
        "engine_start_seconds": start_seconds,
        "ingest_tokens_per_second": max(rates),
        "results": results,
        "engine": info.version,
        "dtype": info.dtype,
        "machine": _machine(),
        "command": " ".join(["kvblend", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
    }


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
            prompt = _prompt(chunks, length, rng)
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
    body = np.concatenate([chunks[i] for i in rng.permutation(len(chunks))])
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


__all__ = ["CHUNK_TOKENS", "arms", "run"]
