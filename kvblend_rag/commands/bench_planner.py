"""``kvblend bench planner``: is a request that the planner decides on ever slower than plain vLLM?

A sweep of cases in which loading does not pay, or may not: short chunks, a long question, a cold disk, a slow remote
tier, running answers, a tiny model. In each, prompts of the same chunks are answered plainly, as the planner decides,
and with everything loaded whatever it takes, in an order that is shuffled each time. Every prompt has a header of its
own, so that the prefix cache helps nobody. Random weights of a model's shape, random tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from kvblend_rag.address import RemoteAddress
from kvblend_rag.blend.chunk import TokenIds, as_token_ids
from kvblend_rag.commands.arms import greedy, seconds, spread
from kvblend_rag.commands.machine import engine_facts
from kvblend_rag.commands.shapes import TINY, write_shape
from kvblend_rag.config import BlendConfig
from kvblend_rag.llm import LLM
from kvblend_rag.quality import bootstrap

if TYPE_CHECKING:
    from rich.table import Table

    from kvblend_rag.output import RequestOutput

ARMS: dict[str, dict[str, Any]] = {"plain": {"blend": False}, "planned": {}, "loaded": {"planner": False}}
_HEADER_TOKENS = 16
_WARM_UPS = 3
_TOKEN_IDS = (100, 4000)


@dataclass(frozen=True)
class Case:
    """Prompts of one kind."""

    name: str
    chunks: int
    chunk_tokens: int
    question_tokens: int = 32
    known: bool = True
    """Whether the chunks are stored."""
    cold: bool = False
    """The operating system's page cache forgets the store before each request."""
    answering: int = 0
    """Answers that run meanwhile."""
    times: int = 1
    """How many times as many prompts as elsewhere: short ones scatter more."""


@dataclass(frozen=True)
class Setup:
    """An engine, and what is asked of it."""

    name: str
    cases: tuple[Case, ...]
    shape: str | None = None
    """None: the sweep's."""
    settings: dict[str, Any] = field(default_factory=dict)


def setups(chunk_tokens: int, remotes: Sequence[str] = ()) -> list[Setup]:
    """The sweep: prompts of six chunks, or about as many tokens."""
    usual = Case("in memory", 6, chunk_tokens)
    found = [
        Setup(
            "memory",
            (
                usual,
                Case("short chunks", 6 * chunk_tokens // 32, 32),
                Case("one short chunk", 1, 32, times=8),
                Case("a long question", 2, chunk_tokens, 4 * chunk_tokens),
                Case("nothing is known", 6, chunk_tokens, known=False),
                Case("busy engine", 6, chunk_tokens, answering=4),
            ),
        ),
        Setup(
            "disk",
            (Case("on disk", 6, chunk_tokens), Case("cold disk", 6, chunk_tokens, cold=True)),
            settings={"max_memory_gb": 0.0},
        ),
        Setup("tiny model", (Case("tiny model", 6, chunk_tokens, times=8),), shape=TINY),
    ]
    for remote in remotes:
        name = f"slow remote tier, {RemoteAddress.parse(remote).tier}"
        settings = {"max_memory_gb": 0.0, "max_disk_gb": 0.0, "remote": (remote,)}
        found.append(Setup(name, (Case(name, 6, chunk_tokens),), settings=settings))
    return found


def run(
    shape: str,
    chunk_tokens: int = 200,
    repeats: int = 9,
    remotes: Sequence[str] = (),
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
    **engine_args: Any,
) -> dict[str, Any]:
    """Measure.

    Args:
        shape: a name in ``shapes.SHAPES``.
        chunk_tokens: of a usual chunk.
        repeats: prompts of each case, each answered in every way; eight times as many where they are short.
        remotes: URLs of remote tiers that are slow, a case each.
        keep: called with what there is so far, after each case: what comes after may not end.
        engine_args: any of vLLM's engine arguments.

    Returns:
        JSON-able; in ``rows``, for each case, seconds by arm, ratios to plain (``mean`` with its 95 % interval), how
        often the planner blended, and what it said where it did not.
    """
    result: dict[str, Any] = {
        "engines": {},
        "settings": {"shape": shape, "tiny": TINY, "chunk_tokens": chunk_tokens, "repeats": repeats},
        "rows": [],
    }
    wanted = setups(chunk_tokens, remotes)
    prompts = sum(case.times * repeats + _WARM_UPS for setup in wanted for case in setup.cases)
    with tqdm(total=prompts, desc="Prompts") as bar:
        for setup in wanted:
            with tempfile.TemporaryDirectory(prefix="kvblend-bench-") as folder:
                model = write_shape(setup.shape or shape, Path(folder) / "model")
                config = BlendConfig(
                    store_path=str(Path(folder) / "store"), ingest_context="none", chunk_size=65_536, **setup.settings
                )
                options = {"load_format": "dummy", "skip_tokenizer_init": True, **engine_args}
                eager = bool(engine_args.get("enforce_eager"))
                with LLM(model, config=config, **options) as llm:
                    result["engines"][setup.name] = engine_facts(llm.kvblend.engine.info, eager)
                    for number, case in enumerate(setup.cases):
                        result["rows"].append(_Sweep(llm, case, number).measure(case.times * repeats, bar))
                        result["worst_ratio"] = max(row["ratio"]["planned"]["median"] for row in result["rows"])
                        keep(result)
    return result


class _Sweep:
    """One case on one engine."""

    def __init__(self, llm: LLM, case: Case, seed: int) -> None:
        self._llm, self._case = llm, case
        self._rng, self._draw = np.random.default_rng(seed), random.Random(seed)
        self._chunks = [self._tokens(case.chunk_tokens) for _ in range(2 * case.chunks)]
        if case.known:
            llm.kvblend.ingest(self._chunks, progress=False)

    def measure(self, repeats: int, bar: Any) -> dict[str, Any]:
        return self._llm.kvblend.engine.run(self._measure(repeats, bar))

    async def _measure(self, repeats: int, bar: Any) -> dict[str, Any]:
        outputs: dict[str, list[RequestOutput]] = {arm: [] for arm in ARMS}
        async with self._answering():
            for repeat in range(-_WARM_UPS, repeats):
                chosen = self._draw.sample(self._chunks, self._case.chunks)
                for arm in self._draw.sample(list(ARMS), len(ARMS)):
                    output = await self._ask(chosen, ARMS[arm])
                    if repeat >= 0:
                        outputs[arm].append(output)
                bar.update()
        return self._row(outputs)

    async def _ask(self, chunks: Sequence[TokenIds], blend: dict[str, Any]) -> RequestOutput:
        prompt = [self._tokens(_HEADER_TOKENS), *chunks, self._tokens(self._case.question_tokens)]
        if self._case.cold:
            forget_pages(Path(self._llm.kvblend.config.store_path))
        async for output in self._llm.stream(
            as_token_ids(np.concatenate(prompt)), greedy(1, detokenize=False), blend=blend
        ):
            final = output
        return final

    @contextlib.asynccontextmanager
    async def _answering(self) -> AsyncIterator[None]:
        """Answers that go on until the case is done."""

        async def answer() -> None:
            long = greedy(self._llm.kvblend.engine.info.max_model_len - 64, ignore_eos=True, detokenize=False)
            while True:
                async for _ in self._llm.stream(self._tokens(32), long, blend=ARMS["plain"]):
                    pass

        tasks = [asyncio.ensure_future(answer()) for _ in range(self._case.answering)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _row(self, outputs: dict[str, list[RequestOutput]]) -> dict[str, Any]:
        times = {arm: [seconds(output) for output in given] for arm, given in outputs.items()}
        ratios = {
            arm: [a / b for a, b in zip(times[arm], times["plain"], strict=True)] for arm in ARMS if arm != "plain"
        }
        planned = [output.report for output in outputs["planned"]]
        reasons = [report.reason for report in planned if report.reason is not None]
        return {
            "case": self._case.name,
            "prompt_tokens": planned[0].prompt_tokens,
            "chunks": self._case.chunks,
            "seconds": {arm: spread(given) for arm, given in times.items()},
            "ratio": {
                arm: {**spread(given), "mean": bootstrap.mean(np.array(given)).to_list()}
                for arm, given in ratios.items()
            },
            "blended": sum(report.blended for report in planned) / len(planned),
            "reason": reasons[-1] if reasons else None,
            "all_seconds": times,
        }

    def _tokens(self, count: int) -> TokenIds:
        return self._rng.integers(*_TOKEN_IDS, count).astype(np.int32)


def forget_pages(folder: Path) -> None:
    """Have the operating system drop what it holds of a folder's files in memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def table(result: dict[str, Any]) -> Table:
    """What ``run`` returned, to be printed."""
    from rich.table import Table

    shown = Table(
        title=f"Time to first token, {result['settings']['shape']}, {result['settings']['repeats']} prompts a case",
        caption="Ratios to plain vLLM: medians, and the 95 % interval of the mean. Loaded: without the planner.",
    )
    for name in ("case", "prompt", "plain s", "planned", "of plain", "loaded", "blended"):
        shown.add_column(name, justify="left" if name == "case" else "right", no_wrap=True)
    for row in result["rows"]:
        ratio = row["ratio"]
        _, low, high = ratio["planned"]["mean"]
        shown.add_row(
            row["case"],
            f"{row['prompt_tokens']:,}",
            f"{row['seconds']['plain']['median']:.3f}",
            f"{ratio['planned']['median']:.3f}",
            f"{low:.2f}–{high:.2f}",
            f"{ratio['loaded']['median']:.2f}",
            f"{row['blended']:.0%}",
        )
    return shown


__all__ = ["ARMS", "Case", "Setup", "forget_pages", "run", "setups", "table"]
