"""``kvblend bench gpu``: TTFT of plain vLLM and of blending on a GPU, interleaved on one engine in one run.

Random weights of a real model's shape; random tokens; chunks in pinned host memory; the prefix cache is
reset before each arm, and TTFT counts from submission, loading included.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvblend_rag.commands import bench_load
from kvblend_rag.commands.shapes import kv_bytes_per_token, write_shape
from kvblend_rag.config import BlendConfig
from kvblend_rag.llm import LLM
from kvblend_rag.store.page_locking import locked_bytes

if TYPE_CHECKING:
    from rich.table import Table

CHUNK_TOKENS = 1024
"""Of prompt for each chunk; the question's share comes out of it, so that chunks are of about 1,000 tokens."""

NOTHING = "nothing matches"
"""The arm whose prompts hold no stored chunk: what blending costs where it can't help."""

_QUESTION_TOKENS = 64

_INGESTED = 128
"""Chunks whose ingest is timed: with fewer, what is still being written when the last is computed counts for much.
As many fill the memory tier."""

_POPULATION = 128
"""Chunks from which prompts under load are drawn."""

_SWEEP_RATIOS = (0.05, 0.1, 0.15, 0.2)

_CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "driver_version")

_COPIED_BYTES = 1 << 30

_FILE_BYTES, _FILES, _FILES_AT_ONCE = 1 << 27, 32, 8


def arms(spans: Sequence[int]) -> dict[str, dict[str, Any] | None]:
    """Options of each arm by name; None is a repeat of the prompt in the warm prefix cache."""
    named: dict[str, dict[str, Any] | None] = {"plain": {"blend": False}, "prefix hit": None, NOTHING: {}}
    named["reuse only"] = {"selector": "none"}
    for span in spans:
        named[f"first 10 %, spans of {span}"] = {"selector": "first", "ratio": 0.1, "span": span}
        asked = {"selector": "question", "ratio": 0.1, "span": span}
        named[f"question 10 %, spans of {span}"] = asked
        named[f"question 10 %, spans of {span}, carried"] = {**asked, "carry": 0.5}
    return named


def sweep_arms() -> dict[str, dict[str, Any] | None]:
    """Plain, a prefix hit, and budgets from 5 to 20 %."""
    budgets = {f"first {ratio:.0%}": {"selector": "first", "ratio": ratio} for ratio in _SWEEP_RATIOS}
    return {"plain": {"blend": False}, "prefix hit": None, **budgets}


def run(
    shape: str = "llama-3.1-8b",
    lengths: Sequence[int] = (8192, 32768),
    spans: Sequence[int] = (64, 16),
    repeats: int = 10,
    timelines: Path | None = None,
    load_seconds: float = 0.0,
    sweep: Sequence[int] = (),
    device_gb: float = 0.0,
    encoding: str = "none",
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
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
        sweep: prompt lengths at which budgets from 5 to 20 % are compared.
        device_gb: GPU memory for a second engine whose chunks have got hot; 0 for none.
        encoding: as which chunks lie in host memory and on disk.
        keep: called with what there is so far, whenever a part is done: what comes after may not end.
        engine_args: any of vLLM's engine arguments.

    Raises:
        ConfigError: no such encoding.
    """
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        model = write_shape(shape, Path(folder) / shape)
        config = BlendConfig(
            store_path=str(Path(folder) / "store"),
            ingest_context="none",
            chunk_size=CHUNK_TOKENS,
            max_memory_gb=_INGESTED * locked_bytes(CHUNK_TOKENS * kv_bytes_per_token(shape)) / (1 << 30),
            planner=False,
        ).replace(encoding=encoding)
        options = {
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "max_model_len": max(lengths) + 64,
            **engine_args,
        }
        result: dict[str, Any] = {
            "shape": shape,
            "encoding": encoding,
            "results": {},
            "device_gb": device_gb,
            "hot": {},
            "sweep": {},
            "load": None,
            "command": " ".join([sys.argv[0], *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%d"),
        }
        started = time.perf_counter()
        with LLM(model, config=config, **options) as llm:
            result["engine_start_seconds"] = time.perf_counter() - started
            result |= _ingest_rates(llm, rng)
            result["disk_bytes_per_second"] = _disk_bandwidth(Path(config.store_path))
            for length in lengths:
                result["results"][str(length)] = _measure(llm, length, arms(spans), repeats, rng)
                keep(result)
            for length in sweep:
                result["sweep"][str(length)] = _measure(llm, length, sweep_arms(), repeats, rng)
            if timelines is not None:
                _trace(llm, max(lengths), arms(spans), timelines, rng)
            if load_seconds:
                result["load"] = _under_load(llm, min(lengths), load_seconds, rng)
            info = llm.kvblend.engine.info
            result |= {"engine": info.version, "dtype": info.dtype, "machine": _machine() | {"clocks": _clocks()}}
            keep(result)
        if device_gb:
            with LLM(model, config=config.replace(max_device_gb=device_gb), **options) as llm:
                for length in lengths:
                    result["hot"][str(length)] = _measure(llm, length, arms(spans), repeats, rng, hot=True)
        result["copy_bytes_per_second"] = _copy_bandwidth()
    return result


def _ingest_rates(llm: LLM, rng: np.random.Generator) -> dict[str, float]:
    """Tokens a second: of ingest, until all is durable, and of vLLM's own prefill of as many chunks.

    The first chunks are ingested into memory that has to be page-locked for them, the others into that of the first.
    """
    engine = llm.kvblend.engine
    texts = [[rng.integers(100, 100_000, CHUNK_TOKENS).astype(np.int32) for _ in range(_INGESTED)] for _ in range(4)]
    llm.kvblend.ingest(texts[0][:8])  # warms up
    first, later = (llm.kvblend.ingest(some) for some in texts[1:3])
    started = time.perf_counter()
    llm.generate(texts[3], engine.one_token(), blend={"blend": False})
    return {
        "first_ingest_tokens_per_second": first.tokens / first.seconds,
        "ingest_tokens_per_second": later.tokens / later.seconds,
        "prefill_tokens_per_second": _INGESTED * CHUNK_TOKENS / (time.perf_counter() - started),
    }


def _library(llm: LLM, length: int, rng: np.random.Generator, count: int | None = None) -> list[Any]:
    """Ingested chunks that fill a prompt of this length but for its question."""
    fitting = length // CHUNK_TOKENS
    size = (length - _QUESTION_TOKENS) // fitting
    chunks = [rng.integers(100, 100_000, size).astype(np.int32) for _ in range(count or fitting)]
    llm.kvblend.ingest(chunks)
    return chunks


def _copy_bandwidth() -> float:
    """Bytes a second of one large copy from pinned host memory to the GPU, the median of five."""
    import torch

    source = torch.empty(_COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    taken = []
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return _COPIED_BYTES / statistics.median(taken)


def _disk_bandwidth(folder: Path) -> float:
    """Bytes a second that the store's device makes durable: files as large as chunks, several at a time."""
    content = memoryview(bytes(_FILE_BYTES))
    paths = [folder / f"bandwidth-{index}" for index in range(_FILES)]

    def write(path: Path) -> None:
        with path.open("wb", buffering=0) as file:
            rest = content
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())

    started = time.perf_counter()
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        list(pool.map(write, paths))
    taken = time.perf_counter() - started
    for path in paths:
        path.unlink()
    return _FILES * _FILE_BYTES / taken


def _under_load(llm: LLM, length: int, seconds: float, rng: np.random.Generator) -> dict[str, Any]:
    chunks = _library(llm, length, rng, _POPULATION)
    traffic = bench_load.Traffic(chunks, length // CHUNK_TOKENS, 100_000)
    return bench_load.run(llm, traffic, bench_load.BLEND, seconds)


def table(result: dict[str, Any]) -> Table:
    """A row for each prompt length and arm."""
    from rich.table import Table  # here, since `tests/gpu/ttft.py` measures without it

    shown = Table(title=f"Time to first token, {result['shape']}, random weights, {result['machine']['gpu']}")
    for column in ("prompt", "", "median ms", "min–max ms", "× plain"):
        shown.add_column(column, justify="left" if not column else "right")
    measured = [*result["results"].items(), *result["sweep"].items()]
    measured += [
        (length, {f"{name}, hot": row for name, row in rows.items()}) for length, rows in result["hot"].items()
    ]
    for length, rows in measured:
        for name, row in rows.items():
            spread = f"{row['min_ms']:.0f}–{row['max_ms']:.0f}"
            shown.add_row(f"{int(length):,}", name, f"{row['median_ms']:.1f}", spread, f"{row['speedup']:.2f}")
    ingest, prefill = result["ingest_tokens_per_second"], result["prefill_tokens_per_second"]
    shown.caption = (
        f"Ingest {ingest:,.0f} tokens a second, {ingest / prefill:.2f} of vLLM's own prefill; the store's device takes "
        f"{result['disk_bytes_per_second'] / 1e9:.2f} GB/s."
    )
    return shown


def _measure(
    llm: LLM,
    length: int,
    named: dict[str, dict[str, Any] | None],
    repeats: int,
    rng: np.random.Generator,
    hot: bool = False,
) -> dict[str, Any]:
    chunks = _library(llm, length, rng)
    engine = llm.kvblend.engine
    one = engine.one_token()
    times: dict[str, list[float]] = {name: [] for name in named}
    steps: dict[str, dict[str, float]] = {}
    reports: dict[str, dict[str, int]] = {}
    tiers: dict[str, dict[str, int]] = {}
    for _ in range(3 if hot else 0):  # what is asked for again gets hot
        llm.generate(_prompt(chunks, length, rng), one, blend={"selector": "none"})
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
                tiers[name] = dict(Counter(use.tier or "" for use in output.report.chunks))
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
            "tiers": tiers[name],
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
    length: int,
    named: dict[str, dict[str, Any] | None],
    folder: Path,
    rng: np.random.Generator,
) -> None:
    engine, chunks = llm.kvblend.engine, _library(llm, length, rng)
    for name, options in named.items():
        if options is None:
            continue
        engine.run(engine.reset_prefix_cache())
        engine.run(engine.call("start_trace"))
        prompt = _prompt([] if name == NOTHING else chunks, length, rng)
        llm.generate(prompt, engine.one_token(), blend=options)
        file = "".join(letter if letter.isalnum() else "-" for letter in name)
        engine.run(engine.call("stop_trace", str(folder / f"{file}.json")))


def _clocks() -> dict[str, str]:
    """Of the first GPU, right after it worked: what it runs at, what it may, and its driver; empty where nobody tells.

    By ``nvidia-smi``, whose names these are; clocks in MHz, power in W.
    """
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_CLOCKS, map(str.strip, told.split(",")), strict=True))


def _machine() -> dict[str, Any]:
    import torch

    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


__all__ = ["CHUNK_TOKENS", "NOTHING", "arms", "run", "table"]
