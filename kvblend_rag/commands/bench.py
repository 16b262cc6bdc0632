"""``kvblend bench``: runs a measurement, prints its table, and writes JSON with versions and machine."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvblend_rag.commands import terminal
from kvblend_rag.commands.machine import engine_facts, has_gpu, machine
from kvblend_rag.commands.session import EngineOptions, started
from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import ConfigError

_SLOWER = 1.03
"""Ratio to plain vLLM that no case may exceed."""


def ttft(
    *,
    engine: EngineOptions,
    prompt_tokens: int = 2000,
    ratio: float = 0.15,
    span: int | None = None,
    selectors: Sequence[str] = ("first", "question", "none"),
    repeats: int = 7,
    seed: int = 0,
    json: str | None = None,
) -> int:
    """Time to first token, plain and blended; see ``bench_ttft``."""
    from kvblend_rag.commands import bench_ttft
    from kvblend_rag.selectors import get_selector

    for name in selectors:
        get_selector(name)
    if not 0 <= ratio <= 1:
        raise ConfigError(f"--ratio is {ratio:g}, and must lie between 0 and 1.")
    console = terminal.prose(json)
    return _measured(
        engine,
        bench_ttft,
        json,
        prompt_tokens=prompt_tokens,
        ratio=ratio,
        span=span,
        selectors=selectors,
        repeats=repeats,
        seed=seed,
        console=console if console.is_terminal else None,
    )


def ingest(*, engine: EngineOptions, repeats: int = 3, json: str | None = None) -> int:
    """Ingest against vLLM's own prefill rate; see ``bench_ingest``."""
    from kvblend_rag.commands import bench_ingest

    return _measured(engine, bench_ingest, json, repeats=repeats)


def match(*, chunks: int = 100_000, prompt_tokens: int = 8192, repeats: int = 50, json: str | None = None) -> int:
    """Finding stored chunks in a prompt; see ``bench_match``."""
    from kvblend_rag.commands import bench_match

    _check_at_least_one(chunks=chunks, prompt_tokens=prompt_tokens, repeats=repeats)
    before = machine()
    result = bench_match.run(chunks, prompt_tokens, repeats)
    terminal.prose(json).print(bench_match.table(result))
    terminal.write_json({"command": _command(), "machine": before, **result}, json)
    return 0


def encodings(*, chunks: int = 32, store: str | None = None, config: str | None = None, json: str | None = None) -> int:
    """What each encoding at rest saves and costs, on chunks of a store; see ``bench_encodings``."""
    from kvblend_rag.commands import bench_encodings

    if chunks < 1:
        raise ConfigError(f"--chunks is {chunks}, and must be 1 or more.")
    settings = BlendConfig.load(config, **({"store_path": str(Path(store).expanduser())} if store else {}))
    before = machine()
    result = bench_encodings.run(settings, chunks)
    terminal.prose(json).print(bench_encodings.table(result))
    terminal.write_json({"command": _command(), "machine": before, **result}, json)
    return 0


def gpu(
    *,
    shape: str = "llama-3.1-8b",
    lengths: Sequence[int] = (8192, 32768),
    spans: Sequence[int] = (64, 16),
    repeats: int = 10,
    load: float = 0.0,
    sweep: Sequence[int] = (),
    device_gb: float = 0.0,
    encoding: str = "none",
    timelines: str | None = None,
    eager: bool = False,
    plot: str | None = None,
    json: str | None = None,
) -> int:
    """TTFT, ingest and load on a GPU, on random weights of a known model's shape; see ``bench_gpu``."""
    from kvblend_rag.commands import bench_gpu, bench_gpu_plot

    _check_shape(shape)
    if not has_gpu():
        raise ConfigError("There is no CUDA GPU here: `kvblend bench ttft` measures on a CPU.")
    folder = Path(timelines) if timelines else None
    result = bench_gpu.run(
        shape, lengths, spans, repeats, folder, load, sweep, device_gb, encoding, _keeper(json), enforce_eager=eager
    )
    terminal.prose(json).print(bench_gpu.table(result))
    if plot:
        bench_gpu_plot.save_plot(result, plot)
    terminal.write_json({**result, "command": _command()}, json)
    return 0


def planner(
    *,
    shape: str = "small",
    chunk_tokens: int = 200,
    repeats: int = 9,
    remotes: Sequence[str] = (),
    eager: bool = False,
    json: str | None = None,
) -> int:
    """Plain vLLM against what the planner decides, in a sweep of cases; 1 where it was slower by more than 3 %."""
    from kvblend_rag.commands import bench_planner

    _check_shape(shape)
    _check_at_least_one(chunk_tokens=chunk_tokens, repeats=repeats)
    before = machine()
    longest = 12 * chunk_tokens + 512
    keep = _keeper(json, machine=before)
    result = bench_planner.run(
        shape, chunk_tokens, repeats, remotes, keep, enforce_eager=eager, max_model_len=longest, **_cpu_arguments()
    )
    terminal.prose(json).print(bench_planner.table(result))
    terminal.write_json({"command": _command(), "machine": before, **result}, json)
    return 1 if result["worst_ratio"] > _SLOWER else 0


def load(
    *,
    shape: str = "small",
    chunk_tokens: int = 128,
    per_prompt: int = 6,
    seconds: float = 20.0,
    eager: bool = False,
    json: str | None = None,
) -> int:
    """Throughput at plain vLLM's latency, and the time between tokens of running answers; see ``bench_load``."""
    from kvblend_rag.commands import bench_load

    _check_shape(shape)
    _check_at_least_one(chunk_tokens=chunk_tokens, per_prompt=per_prompt, seconds=seconds)
    before = machine()
    result = bench_load.measure(shape, chunk_tokens, per_prompt, seconds, enforce_eager=eager, **_cpu_arguments())
    terminal.prose(json).print(bench_load.table(result))
    terminal.write_json({"command": _command(), "machine": before, **result}, json)
    return 0


def _check_shape(shape: str) -> None:
    from kvblend_rag.commands.shapes import SHAPES

    if shape not in SHAPES:
        raise ConfigError(f"--shape is {shape!r}, and must be one of {', '.join(SHAPES)}.")


def _check_at_least_one(**options: float) -> None:
    for name, value in options.items():
        if value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value:.15g}, and must be 1 or more.")


def _cpu_arguments() -> dict[str, Any]:
    """Without a GPU, vLLM would take nine tenths of the machine's memory for each engine."""
    return {} if has_gpu() else {"kv_cache_memory_bytes": 1 << 30}


def _measured(engine: EngineOptions, bench: Any, json: str | None, *, planner: bool = False, **settings: Any) -> int:
    """Without the planner every arm is measured, be it slower than plain vLLM."""
    before = machine()
    with tempfile.TemporaryDirectory(prefix="kvblend-bench-") as folder:
        config = engine.resolve().replace(planner=planner)
        # A store of its own: what lies in the user's would be found, or be deleted.
        if engine.store is None:
            config = config.replace(store_path=folder)
        with started(config, verbose=engine.verbose) as llm:
            facts = engine_facts(llm.kvblend.engine.info, bool(config.engine_args.get("enforce_eager")))
            result = bench.run(llm, **settings)
    terminal.prose(json).print(bench.table(result))
    terminal.write_json({"command": _command(), "machine": before, "engine": facts, **result}, json)
    return 0


def _keeper(target: str | None, **facts: Any) -> Callable[[dict[str, Any]], None]:
    """Writes what there is so far into the file that is named, if one is."""

    def keep(result: dict[str, Any]) -> None:
        if target != "-":
            terminal.write_json({**facts, **result, "command": _command()}, target)

    return keep


def _command() -> str:
    return shlex.join(["kvblend", *sys.argv[1:]])


__all__ = ["encodings", "gpu", "ingest", "load", "match", "planner", "ttft"]
