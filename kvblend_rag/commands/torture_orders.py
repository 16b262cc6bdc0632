"""Chunks in ever new orders on a store that holds a fifth of them: is what is there always found, and always as fast?

Each prompt is some chunks out of many, drawn by Zipf's law, in an order that was never asked before. Before it is
asked, it is noted which of its chunks the store holds; afterwards those that were missing are ingested, as an
application does that ingests what it retrieves, and others leave for them.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from kvblend_rag.blend.chunk import TokenIds, as_token_ids, chunk_key, namespace
from kvblend_rag.commands.arms import greedy, seconds, spread
from kvblend_rag.commands.random_model import VOCABULARY, write_random_model
from kvblend_rag.config import BlendConfig

if TYPE_CHECKING:
    from kvblend_rag.llm import LLM
    from kvblend_rag.output import RequestOutput

_LENGTHS = (48, 320)
"""Of chunks, in tokens."""

_ENDS = 100
"""Prompts at the beginning and the end that are also asked plainly."""

_LAYERS, _HIDDEN = 6, 384
"""Large enough for loading to pay, small enough for two cores to answer a thousand prompts in minutes."""

_ZIPF = 1.0
_GIB = 1 << 30


def run(folder: Path, *, orders: int = 1000, chunks: int = 1000, per_prompt: int = 14, seed: int = 0) -> dict[str, Any]:
    """Ask.

    Args:
        folder: an empty one, for model and store.
        orders: prompts.
        chunks: documents.
        per_prompt: chunks in a prompt.
        seed: of everything.

    Returns:
        JSON-able: ``reused_share`` of the resident chunks' tokens, over all prompts and the least of one; speed-ups of
        the first and last prompts; ``wrong``, a sentence for each figure that is not reached.
    """
    from kvblend_rag.llm import LLM

    rng = np.random.default_rng(seed)
    texts = [rng.integers(5, VOCABULARY, int(rng.integers(*_LENGTHS))).astype(np.int32) for _ in range(chunks)]
    model = write_random_model(folder / "model", layers=_LAYERS, hidden=_HIDDEN)
    token_bytes = _LAYERS * 2 * (_HIDDEN // 2) * 4
    bound = sum(map(len, texts)) * token_bytes / 5
    config = BlendConfig(
        store_path=str(folder / "store"),
        ingest_context="none",
        chunk_size=_LENGTHS[1],
        max_disk_gb=bound / _GIB,
        max_memory_gb=bound / 2 / _GIB,
        planner=False,
        selector="first",
    )
    options = {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": per_prompt * _LENGTHS[1] + 64,
        "kv_cache_memory_bytes": 1 << 29,
    }
    with LLM(model, config=config, **options) as llm:
        return _Orders(llm, texts, rng).run(orders, per_prompt, bound)


class _Orders:
    def __init__(self, llm: LLM, texts: list[TokenIds], rng: np.random.Generator) -> None:
        self._llm, self._texts, self._rng = llm, texts, rng
        info = llm.kvblend.engine.info
        space = namespace(info.fingerprint, info.context, "")
        self._keys = [chunk_key(space, text) for text in texts]
        weights = 1.0 / np.arange(1, len(texts) + 1) ** _ZIPF
        self._weights = weights / weights.sum()

    def run(self, orders: int, per_prompt: int, bound: float) -> dict[str, Any]:
        llm = self._llm
        # As many of the popular ones as surely fit: what an ingest stores may not leave before it is done.
        room = np.cumsum([len(text) for text in self._texts]) <= 0.8 * sum(map(len, self._texts)) / 5
        llm.kvblend.ingest([text for text, fits in zip(self._texts, room, strict=True) if fits], progress=False)
        ends = min(_ENDS, orders // 2)
        seen: set[tuple[int, ...]] = set()
        first: list[float] = []
        last: list[float] = []
        shares: list[float] = []
        resident_tokens = reused = missing = largest = 0
        for number in tqdm(range(orders), desc="Orders"):
            while (order := self._order(per_prompt)) in seen:
                pass
            seen.add(order)
            prompt = self._prompt(order)
            absent = set(llm.kvblend.catalogue.missing([self._keys[index] for index in order]))
            held = [index for index in order if self._keys[index] not in absent]
            output = self._ask(prompt, {})
            report = output.report
            resident = sum(len(self._texts[index]) for index in held)
            found = report.reused_tokens + report.recomputed_tokens
            shares.append(found / resident if resident else 1.0)
            resident_tokens, reused, missing = resident_tokens + resident, reused + found, missing + len(absent)
            if number < ends or number >= orders - ends:
                plain = self._ask(prompt, {"blend": False})
                (first if number < ends else last).append(seconds(plain) / seconds(output))
            if absent:
                llm.kvblend.ingest([self._texts[i] for i in order if self._keys[i] in absent], progress=False)
            largest = max(largest, self._stored_bytes())
        shorter, longer = statistics.median(first), statistics.median(last)
        figures = {
            "orders": orders,
            "chunks": len(self._texts),
            "per_prompt": per_prompt,
            "store_bound_bytes": round(bound),
            "store_bytes_at_most": largest,
            "chunks_missing": missing,
            "resident_tokens": resident_tokens,
            "reused_share": reused / resident_tokens,
            "least_reused_share": min(shares),
            "speedup_first": spread(first),
            "speedup_last": spread(last),
            "last_to_first": longer / shorter,
        }
        return figures | {"wrong": list(_violations(figures))}

    def _order(self, count: int) -> tuple[int, ...]:
        drawn = self._rng.choice(len(self._texts), count, replace=False, p=self._weights)
        return tuple(int(index) for index in drawn)

    def _prompt(self, order: tuple[int, ...]) -> TokenIds:
        parts = [self._rng.integers(5, VOCABULARY, 16), *(self._texts[index] for index in order)]
        return as_token_ids(np.concatenate([*parts, self._rng.integers(5, VOCABULARY, 32)]))

    def _ask(self, prompt: TokenIds, blend: dict[str, Any]) -> RequestOutput:
        engine = self._llm.kvblend.engine
        engine.run(engine.reset_prefix_cache())
        (output,) = self._llm.generate([prompt], greedy(1, detokenize=False), blend=blend)
        return output

    def _stored_bytes(self) -> int:
        return int(self._llm.kvblend.catalogue.stats()["bytes"])


def _violations(figures: dict[str, Any]) -> list[str]:
    limits = (
        (figures["reused_share"] >= 0.98, f"only {figures['reused_share']:.1%} of the resident tokens were reused"),
        (figures["last_to_first"] >= 0.9, f"the last prompts gained {figures['last_to_first']:.0%} of the first"),
        (
            figures["store_bytes_at_most"] <= 1.01 * figures["store_bound_bytes"],
            f"the store held {figures['store_bytes_at_most']:,} bytes, and may hold {figures['store_bound_bytes']:,}",
        ),
        (figures["chunks_missing"] > 0, "no chunk was ever missing: the store was not bounded"),
    )
    return [sentence for kept, sentence in limits if not kept]


__all__ = ["run"]
