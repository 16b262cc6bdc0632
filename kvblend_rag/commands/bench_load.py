"""``kvblend bench load``: plain vLLM and blending under load, on one engine in one run; part of ``bench gpu`` too.

Prompts of chunks that are drawn by Zipf's law arrive at random (Poisson), whether earlier ones are answered
or not. The prefix cache stays on and is emptied before each run.

- Throughput: plain requests at a rate that the engine sustains give a 95th percentile of TTFT; then the highest
  tried rate of blended ones that keeps it.
- Inter-token latency: how long the tokens of running answers are apart while long prompts arrive: none, plain ones,
  blended ones, and both by turns.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from kvblend_rag.blend.chunk import TokenIds, as_token_ids
from kvblend_rag.commands.machine import engine_facts
from kvblend_rag.config import BlendConfig
from kvblend_rag.llm import LLM

if TYPE_CHECKING:
    from rich.table import Table

PLAIN = {"blend": False}
_QUESTION_TOKENS = 64
_UTILISATION = 0.7
"""Share of the plain engine's capacity at which its latency is taken."""

_RATES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0)
"""Rates of blended requests that are tried, as multiples of the plain one."""

_DECODERS = 16
_ANSWER = 4096
"""Tokens of a running answer at most."""

BLEND = {"selector": "first", "ratio": 0.1, "span": 64}


@dataclass
class Traffic:
    """Prompts of some chunks and a new question each.

    Args:
        chunks: token ids of each stored chunk.
        per_prompt: distinct chunks in a prompt.
        vocabulary: token ids below which questions are drawn.
        exponent: of Zipf's law, by which chunks are popular.
    """

    chunks: Sequence[TokenIds]
    per_prompt: int
    vocabulary: int
    exponent: float = 1.0
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def prompt(self) -> TokenIds:
        """The next prompt, int32."""
        weights = 1.0 / np.arange(1, len(self.chunks) + 1) ** self.exponent
        chosen = self.rng.choice(len(self.chunks), self.per_prompt, replace=False, p=weights / weights.sum())
        question = self.rng.integers(100, self.vocabulary, _QUESTION_TOKENS)
        return as_token_ids(np.concatenate([*(self.chunks[index] for index in chosen), question]))

    def arrivals(self, rate: float, seconds: float) -> npt.NDArray[np.float64]:
        """Seconds from the start, of a Poisson process."""
        count = max(8, round(rate * seconds))
        return np.cumsum(self.rng.exponential(1.0 / rate, count))


def run(
    llm: LLM, traffic: Traffic, blend: dict[str, Any], seconds: float = 20.0, answer_tokens: int = 16
) -> dict[str, Any]:
    """Measure; returns a JSON-able dictionary.

    Args:
        llm: the engine; the chunks are ingested.
        traffic: what is asked.
        blend: options of the blended requests.
        seconds: how long prompts arrive in each run.
        answer_tokens: tokens of each answer.
    """
    engine = llm.kvblend.engine
    for options in (PLAIN, blend, PLAIN, blend):  # the first ones compile and allocate
        alone = _loaded(llm, traffic, [0.0], options, answer_tokens)
        if options is PLAIN:
            plain_alone = alone["ttft_ms"]["p50"]
    rate = _UTILISATION * 1e3 / plain_alone
    plain = _loaded(llm, traffic, traffic.arrivals(rate, seconds), PLAIN, answer_tokens)
    rows = [{"arm": "plain", "rate": rate, **plain}]
    sustained = 0.0
    for factor in tqdm(_RATES, desc="Rates"):
        row = _loaded(llm, traffic, traffic.arrivals(rate * factor, seconds), blend, answer_tokens)
        rows.append({"arm": "blended", "rate": rate * factor, **row})
        if row["ttft_ms"]["p95"] > plain["ttft_ms"]["p95"]:
            break
        sustained = factor
    arriving: dict[str, list[dict[str, Any]]] = {
        "idle": [],
        "plain": [PLAIN],
        "blended": [blend],
        "mixed": [PLAIN, blend],
    }
    # The same prompts at the same times for each kind: a run of seconds sees a dozen of them, give or take four.
    times = [at for at in traffic.arrivals(rate / 2, seconds) if at < seconds]
    prompts = [traffic.prompt() for _ in times]
    decoding = {name: _decoding(llm, traffic, times, prompts, kinds, seconds) for name, kinds in arriving.items()}
    engine.run(engine.reset_prefix_cache())
    return {
        "settings": {
            "chunks": len(traffic.chunks),
            "chunks_per_prompt": traffic.per_prompt,
            "zipf_exponent": traffic.exponent,
            "prompt_tokens": len(traffic.prompt()),
            "answer_tokens": answer_tokens,
            "seconds": seconds,
            "blend": blend,
        },
        "rows": rows,
        "rate_at_plain_p95": sustained,
        "inter_token_ms": decoding,
    }


def measure(shape: str, chunk_tokens: int, per_prompt: int, seconds: float, **engine_args: Any) -> dict[str, Any]:
    """``run`` on an engine of its own, with random weights; JSON-able.

    Args:
        shape: a name in ``shapes.SHAPES``.
        chunk_tokens: of each of the chunks.
        per_prompt: chunks in a prompt.
        seconds: how long prompts arrive in each run.
        engine_args: any of vLLM's engine arguments.
    """
    from kvblend_rag.commands.shapes import SHAPES, write_shape

    rng, vocabulary = np.random.default_rng(0), SHAPES[shape]["vocab_size"]
    with tempfile.TemporaryDirectory(prefix="kvblend-bench-") as folder:
        config = BlendConfig(
            store_path=str(Path(folder) / "store"), ingest_context="none", chunk_size=65_536, planner=False
        )
        options = {
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "max_model_len": max(_ANSWER + 256, chunk_tokens * per_prompt + 256),
            **engine_args,
        }
        with LLM(write_shape(shape, Path(folder) / "model"), config=config, **options) as llm:
            chunks = [rng.integers(100, vocabulary, chunk_tokens).astype(np.int32) for _ in range(8 * per_prompt)]
            llm.kvblend.ingest(chunks)
            found = run(llm, Traffic(chunks, per_prompt, vocabulary), BLEND, seconds)
            info = llm.kvblend.engine.info
    return {"engine": engine_facts(info, bool(engine_args.get("enforce_eager"))), "shape": shape, "load": found}


def table(result: dict[str, Any]) -> Table:
    """Milliseconds between the tokens of running answers, by what arrives."""
    from rich.table import Table

    load = result["load"]
    shown = Table(title=f"Between the tokens of {_DECODERS} answers, {result['shape']}, random weights")
    for column in ("arriving", "mean, ms", "p50", "p95", "p99", "max"):
        shown.add_column(column, justify="left" if column == "arriving" else "right")
    for name, gaps in load["inter_token_ms"].items():
        shown.add_row(name, *(f"{gaps[key]:.1f}" for key in ("mean", "p50", "p95", "p99", "max")))
    shown.caption = (
        f"Blended requests keep plain ones' 95th percentile of TTFT at {load['rate_at_plain_p95']:g} times the rate."
    )
    return shown


def _loaded(
    llm: LLM, traffic: Traffic, arrivals: Sequence[float] | npt.NDArray[np.float64], blend: dict[str, Any], answer: int
) -> dict[str, Any]:
    """TTFT of requests that arrive at these times."""
    from kvblend_rag.commands.arms import greedy

    prompts = [traffic.prompt() for _ in arrivals]
    params = greedy(answer, ignore_eos=True, detokenize=False)
    engine = llm.kvblend.engine
    engine.run(engine.reset_prefix_cache())

    async def one(prompt: TokenIds, after: float) -> float:
        await asyncio.sleep(after)
        async for output in llm.stream(prompt, params, blend=blend):
            last = output
        assert last.metrics is not None
        return last.metrics.ttft * 1e3

    async def all_of_them() -> list[float]:
        return list(await asyncio.gather(*(one(p, float(at)) for p, at in zip(prompts, arrivals, strict=True))))

    started = time.perf_counter()
    times = engine.run(all_of_them())
    return {
        "requests": len(times),
        "served_per_second": len(times) / (time.perf_counter() - started),
        "ttft_ms": _percentiles(times),
    }


def _decoding(
    llm: LLM,
    traffic: Traffic,
    times: Sequence[float],
    prompts: Sequence[TokenIds],
    kinds: Sequence[dict[str, Any]],
    seconds: float,
) -> dict[str, float]:
    """Milliseconds between the tokens of running answers while the prompts arrive, of these kinds by turns."""
    from kvblend_rag.commands.arms import greedy

    engine = llm.kvblend.engine
    engine.run(engine.reset_prefix_cache())
    long, short = greedy(_ANSWER, ignore_eos=True, detokenize=False), greedy(1, detokenize=False)
    gaps: list[float] = []

    async def decoder(until: float) -> None:
        prompt = traffic.rng.integers(100, traffic.vocabulary, 128).astype(np.int32)
        last = None
        async for _ in llm.stream(prompt, long, blend=PLAIN):
            now = time.perf_counter()
            if last is not None:
                gaps.append((now - last) * 1e3)
            last = now
            if now > until:
                return

    async def arrival(after: float, prompt: TokenIds, blend: dict[str, Any]) -> None:
        await asyncio.sleep(1 + after)
        async for _ in llm.stream(prompt, short, blend=blend):
            pass

    async def all_of_them() -> None:
        decoders = [decoder(time.perf_counter() + 1 + seconds) for _ in range(_DECODERS)]
        await asyncio.gather(*decoders, *map(arrival, times, prompts, itertools.cycle(kinds)))

    engine.run(all_of_them())
    spread = {**_percentiles(gaps), "mean": float(np.mean(gaps)), "max": float(np.max(gaps))}
    return {**spread, "prompts": len(times) if kinds else 0}


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{share}": float(np.percentile(values, share)) for share in (50, 95, 99)}


__all__ = ["BLEND", "PLAIN", "Traffic", "measure", "run", "table"]
