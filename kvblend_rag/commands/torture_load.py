"""Many streaming clients of a server at once, some of whom leave: is every answer right, is anything stuck or left?

`kvblend serve` in a process of its own, asked over HTTP as any client asks it. A small model with random weights in
float32, a cache that is too small for all, so that requests are preempted, and the prefix cache on. Each client asks,
reads the stream, and in some cases leaves it, again and again. What they ask comes from a set of prompts whose answers
are known: asked alone before, on an empty prefix cache.

- ``plain`` and ``everything`` (all reused tokens recomputed) must give the plain answer.
- ``none`` (nothing recomputed) and ``question`` must give what the same request gave alone. A blend that begins
  from a part of its own in the prefix cache, as after a preemption, chooses among the rest, so ``question`` is held
  to it only where nothing was cached and nobody was preempted.

An answer is wrong from the first token that differs, unless the two likeliest were as good as equal there: what else
is in a batch changes the last bits of a float32.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvblend_rag.blend.chunk import TokenIds, as_token_ids
from kvblend_rag.commands.random_model import VOCABULARY, write_random_model
from kvblend_rag.commands.server_process import ServerProcess, running
from kvblend_rag.config import BlendConfig
from kvblend_rag.conversation.sampling import Sampling
from kvblend_rag.kvblend import KVBlend
from kvblend_rag.output import RequestOutput, last

ARMS: dict[str, dict[str, Any]] = {
    "plain": {"blend": False},
    "everything": {"selector": "everything", "ratio": 1.0},
    "none": {"selector": "none"},
    "question": {"selector": "question", "ratio": 0.2},
}
_PROMPTS = 24
"""Of each arm."""

_ANSWER = 24
_LEAVING = 0.2
_TIE = 2e-3
"""Nats between the two likeliest tokens, below which either is right."""

_STUCK_SECONDS = 120.0
_LOOK_SECONDS = 1.0
"""Between two looks at the server's counter of preemptions."""

_GROWTH = 96 << 20
"""Bytes that a process may grow by: allocators keep what they once had."""


@dataclass(frozen=True)
class Asked:
    """A prompt in one way, and its answer."""

    arm: str
    prompt: TokenIds
    token_ids: tuple[int, ...] = ()
    margins: tuple[float, ...] = ()
    """Between the two likeliest tokens at each place, in nats."""

    def differs(self, token_ids: Sequence[int]) -> bool:
        """Whether an answer, whole or the beginning of one, is another."""
        for place, (found, expected) in enumerate(zip(token_ids, self.token_ids, strict=False)):
            if found != expected:
                return self.margins[place] > _TIE
        return False


def run(
    folder: Path, *, clients: int = 500, minutes: float = 10.0, seed: int = 0, show: Callable[[str], None] = print
) -> dict[str, Any]:
    """Ask for so long.

    Args:
        folder: an empty one, for model, store and the server's log.
        clients: at once.
        minutes: of load.
        seed: of prompts and clients.
        show: told how it goes.

    Returns:
        JSON-able: requests by arm and outcome, preemptions, memory of each process by time and its growth from the
        middle to the end; ``wrong``, a sentence a violation.

    Raises:
        EngineUnavailable: the server did not start.
    """
    model = write_random_model(folder / "model")
    settings = {"ingest_context": "none", "chunk_size": 256, "min_run": 1, "max_memory_gb": 0.004, "planner": False}
    command = [sys.executable, "-m", "kvblend_rag.cli", "serve", str(model), "--store", str(folder / "store")]
    command += [f"--set={name}={json.dumps(value)}" for name, value in settings.items()]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "32"]
    command += ["--max-num-batched-tokens", "1024", "--num-gpu-blocks-override", "64"]
    command += ["--kv-cache-memory-bytes", str(1 << 28), "--disable-uvicorn-access-log"]
    with (
        running(command, folder, VLLM_SERVER_DEV_MODE="1") as server,  # for its route that empties the prefix cache
        KVBlend(BlendConfig(base_url=f"{server.url}/v1")) as kv,
    ):
        return _Load(server, kv, clients, random.Random(seed), np.random.default_rng(seed)).run(60 * minutes, show)


class _Load:
    def __init__(
        self, server: ServerProcess, kv: KVBlend, clients: int, draw: random.Random, rng: np.random.Generator
    ) -> None:
        self._server, self._kv, self._clients, self._draw, self._rng = server, kv, clients, draw, rng
        self._counts: Counter[str] = Counter()
        self._wrong: list[str] = []
        self._preempted = 0

    def run(self, seconds: float, show: Callable[[str], None]) -> dict[str, Any]:
        kv = self._kv
        chunks = [self._tokens(int(size)) for size in self._rng.integers(60, 200, 30)]
        kv.ingest(chunks, progress=False)
        known = [self._alone(arm, self._prompt(chunks)) for arm in ARMS for _ in range(_PROMPTS)]
        before = self._preemptions()
        memory = kv.engine.run(self._ask_all(known, seconds, show))
        self._wrong += self._left_behind()
        again = [self._alone(each.arm, each.prompt) for each in known[:: _PROMPTS // 2]]
        for one, other in zip(known[:: _PROMPTS // 2], again, strict=True):
            if one.differs(other.token_ids):
                self._wrong.append(f"{one.arm}: after the load, the same request alone gives another answer")
        preempted = self._preemptions() - before
        if not preempted:
            self._wrong.append("nothing was preempted: the cache was not too small")
        for name, sizes in memory.items():
            if len(sizes) > 2 and sizes[-1] - sizes[len(sizes) // 3] > _GROWTH:
                self._wrong.append(f"{name} grew from {sizes[len(sizes) // 3]:,} to {sizes[-1]:,} bytes")
        if "Traceback" in self._server.log.read_text(errors="replace"):
            self._wrong.append("the server's log has a traceback")
        return {
            "clients": self._clients,
            "seconds": seconds,
            "requests": dict(sorted(self._counts.items())),
            "preemptions": preempted,
            "memory_bytes": memory,
            "memory_growth": {name: round(sizes[-1] / sizes[len(sizes) // 2] - 1, 5) for name, sizes in memory.items()},
            "wrong": self._wrong,
        }

    async def _ask_all(
        self, known: Sequence[Asked], seconds: float, show: Callable[[str], None]
    ) -> dict[str, list[int]]:
        until = time.monotonic() + seconds
        looking = asyncio.ensure_future(self._look())
        tasks = [asyncio.ensure_future(self._client(index, known, until)) for index in range(self._clients)]
        memory: dict[str, list[int]] = {}
        interval = max(min(20.0, seconds / 6), 1.0)
        while time.monotonic() < until:
            await asyncio.sleep(min(interval, max(until - time.monotonic(), 0.01)))
            for name, size in _resident(self._server.pid).items():
                memory.setdefault(name, []).append(size)
            show(f"{sum(self._counts.values()):,} answers, {len(self._wrong)} wrong")
        _, stuck = await asyncio.wait(tasks, timeout=_STUCK_SECONDS)
        for task in (*stuck, looking):
            task.cancel()
        if stuck:
            self._wrong.append(f"{len(stuck)} requests were not answered within {_STUCK_SECONDS:g} s of the last one")
        for task in tasks:
            if task not in stuck and task.exception() is not None:
                self._wrong.append(f"a client ended with {task.exception()!r}")
        return memory

    async def _client(self, index: int, known: Sequence[Asked], until: float) -> None:
        draw = random.Random(f"{index} {self._draw.random()}")
        while time.monotonic() < until:
            asked = draw.choice(known)
            leave = draw.randrange(_ANSWER) if draw.random() < _LEAVING else None
            before = self._preempted
            found: list[int] = []
            async with contextlib.aclosing(self._stream(asked)) as outputs:
                async for output in outputs:
                    found += [token for each in output.outputs for token in each.token_ids]
                    if leave is not None and len(found) > leave:
                        break
            outcome = "answered" if leave is None else "left"
            differs = asked.differs(found)
            if differs and asked.arm == "question":
                await asyncio.sleep(_LOOK_SECONDS)  # the counter comes a step behind
                whole = leave is None and output.report.cached_tokens == 0
                differs = whole and await asyncio.to_thread(self._preemptions) == before
            if differs:
                outcome = "wrong"
                self._wrong.append(f"{asked.arm}: {found} in place of {list(asked.token_ids[: len(found)])}")
            elif leave is None and len(found) != _ANSWER:
                outcome = "cut"
                self._wrong.append(f"{asked.arm}: an answer ended after {len(found)} of {_ANSWER} tokens")
            elif leave is None and asked.arm != "plain" and not output.report.on_blended_kv:
                outcome = "not blended"
                self._wrong.append(f"{asked.arm}: not blended: {output.report.reason}")
            self._counts[f"{asked.arm} {outcome}"] += 1

    async def _look(self) -> None:
        while True:
            self._preempted = await asyncio.to_thread(self._preemptions)
            await asyncio.sleep(_LOOK_SECONDS)

    def _preemptions(self) -> int:
        return int(self._server.metric("vllm:num_preemptions_total"))

    def _left_behind(self) -> Iterator[str]:
        """What the server still holds when nobody asks any more; it may be a moment until it knows who has left."""
        end = time.monotonic() + _STUCK_SECONDS
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        while (under_way := sum(map(self._server.metric, names))) or not self._server.reset_prefix_cache():
            if time.monotonic() > end:
                yield f"when nobody asks any more, {under_way:g} requests are under way or blocks are in use"
                return
            time.sleep(0.5)

    def _alone(self, arm: str, prompt: TokenIds) -> Asked:
        """What a request gives alone; where everything is recomputed, what plain vLLM gives."""
        self._server.reset_prefix_cache()
        reference = ARMS["plain" if arm == "everything" else arm]
        output = self._kv.engine.run(last(self._kv.stream(prompt, _sampling(logprobs=True), blend=reference)))
        completion = output.outputs[0]
        margins = []
        for choices in completion.logprobs or ():
            best = sorted((choice.logprob for choice in choices.values()), reverse=True)
            margins.append(best[0] - best[1])
        return Asked(arm, prompt, tuple(completion.token_ids), tuple(margins))

    def _stream(self, asked: Asked) -> AsyncGenerator[RequestOutput, None]:
        sampling = self._kv.engine.sampling(_sampling(), stream=True)
        return self._kv.stream(asked.prompt, sampling, blend=ARMS[asked.arm])

    def _prompt(self, chunks: Sequence[TokenIds]) -> TokenIds:
        """A header of its own, so that no other prompt's exact blocks are hit, and some chunks in a new order."""
        chosen = self._rng.choice(len(chunks), 3, replace=False)
        parts = [self._tokens(12), *(chunks[index] for index in chosen), self._tokens(20)]
        return as_token_ids(np.concatenate(parts))

    def _tokens(self, count: int) -> TokenIds:
        return self._rng.integers(5, VOCABULARY, count).astype(np.int32)


def _sampling(*, logprobs: bool = False) -> Sampling:
    return Sampling(
        temperature=0.0,
        max_tokens=_ANSWER,
        logprobs=logprobs,
        top_logprobs=2 if logprobs else 0,
        extra={"ignore_eos": True},
    )


def _resident(server: int) -> dict[str, int]:
    """Bytes in memory of this process and of those it started, by name; ``server`` is the front end's."""
    parents, names, sizes = {}, {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            name, _, rest = (folder / "stat").read_text().partition("(")[2].rpartition(")")
            pid, fields = int(folder.name), rest.split()
            parents[pid], names[pid] = int(fields[1]), name
            sizes[pid] = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    found: dict[str, int] = {}
    for pid in ours:
        name = {os.getpid(): "client", server: "server"}.get(pid, names[pid])
        found[name] = found.get(name, 0) + sizes[pid]
    return found


__all__ = ["ARMS", "Asked", "run"]
