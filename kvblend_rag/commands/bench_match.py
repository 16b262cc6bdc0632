"""How long it takes to find stored chunks in a prompt.

Tokens are drawn with the frequencies of natural text (Zipf), so that common words collide as they do in
documents. Three prompts: 24 chunks among other text, the same without any, and 24 chunks of a store where
every chunk opens with the same 64 tokens.
"""

from __future__ import annotations

import platform
import statistics
import time
from importlib.metadata import version
from typing import Any

import numpy as np
from rich.table import Table

from kvblend_rag.blend.chunk import TokenIds, as_token_ids
from kvblend_rag.blend.match import ChunkIndex

_CHUNK_TOKENS = 256
_PRESENT = 24
_SHARED_OPENING = 64
_VOCABULARY = 150_000


def run(chunks: int = 100_000, prompt_tokens: int = 8192, repeats: int = 50, seed: int = 0) -> dict[str, Any]:
    """Times adding and matching.

    Args:
        chunks: chunks of 256 tokens in the index, at least 1.
        prompt_tokens: length of the prompt.
        repeats: timed calls of each case, at least 1.
        seed: of the random tokens.

    Returns:
        JSON-able: ``settings``, ``versions`` and, by name of the case, ``cases`` with the seconds it took
        to add all chunks (``add_all_s``), the milliseconds to add one more (``add_one_ms``) and to match
        (``median_ms``, ``p95_ms``, ``max_ms``), and what was found.
    """
    random = np.random.default_rng(seed)
    stored = _text(random, chunks * _CHUNK_TOKENS).reshape(chunks, _CHUNK_TOKENS)
    present = random.choice(chunks, min(_PRESENT, chunks), replace=False)
    prose = _text(random, prompt_tokens)
    index, adding = _filled(stored)
    cases = {
        "24 chunks present": adding | _timed(index, _prompt(stored[present], prose), repeats),
        "none present": adding | _timed(index, prose, repeats),
    }
    stored[:, :_SHARED_OPENING] = stored[0, :_SHARED_OPENING]
    index, adding = _filled(stored)
    cases["24 present, all open alike"] = adding | _timed(index, _prompt(stored[present], prose), repeats)
    settings = {"chunks": chunks, "prompt_tokens": prompt_tokens, "repeats": repeats, "seed": seed}
    versions = {"python": platform.python_version(), "numpy": version("numpy")}
    return {"settings": settings, "versions": versions, "cases": cases}


def table(result: dict[str, Any]) -> Table:
    """What ``run`` returned, to be printed."""
    settings = result["settings"]
    title = f"{settings['prompt_tokens']:,} prompt tokens against {settings['chunks']:,} chunks"
    shown = Table("", "found", "median ms", "p95 ms", "max ms", "add all s", "add one ms", title=title)
    for column in shown.columns[1:]:
        column.justify = "right"
    for name, case in result["cases"].items():
        times = (f"{case[key]:.2f}" for key in ("median_ms", "p95_ms", "max_ms", "add_all_s", "add_one_ms"))
        shown.add_row(name, f"{case['found']} ({case['found_tokens']:,} tokens)", *times)
    return shown


def _text(random: np.random.Generator, tokens: int) -> TokenIds:
    ranks = np.minimum(random.zipf(1.2, tokens), _VOCABULARY - 1)
    return as_token_ids(random.permutation(_VOCABULARY)[ranks])


def _filled(stored: TokenIds) -> tuple[ChunkIndex, dict[str, float]]:
    index = ChunkIndex()
    begin = time.perf_counter()
    index.add_many((f"{number:032x}", tokens) for number, tokens in enumerate(stored))
    all_added = time.perf_counter()
    extra = stored[:100] + 1
    for number, tokens in enumerate(extra):
        index.add(f"extra {number}", tokens)
    one_ms = (time.perf_counter() - all_added) * 1e3 / len(extra)
    return index, {"add_all_s": all_added - begin, "add_one_ms": one_ms}


def _prompt(chunks: TokenIds, prose: TokenIds) -> TokenIds:
    """The chunks, each without its first and last token, 20 others between them, prose to the end."""
    parts = []
    for number, chunk in enumerate(chunks):
        parts += [prose[number * 20 : (number + 1) * 20], chunk[1:-1]]
    return as_token_ids(np.concatenate([*parts, prose])[: len(prose)])


def _timed(index: ChunkIndex, prompt: TokenIds, repeats: int) -> dict[str, float]:
    found = index.match(prompt)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        index.match(prompt)
        times.append((time.perf_counter() - begin) * 1e3)
    return {
        "found": len(found),
        "found_tokens": sum(match.length for match in found),
        "median_ms": statistics.median(times),
        "p95_ms": float(np.percentile(times, 95)),
        "max_ms": max(times),
    }


__all__ = ["run", "table"]
