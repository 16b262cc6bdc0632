"""FakeShelf: chunks without KV, found in prompts by the same matching as the real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kvblend_rag.blend.chunk import TokenIds, as_token_ids
from kvblend_rag.config import BlendConfig
from kvblend_rag.engine import EngineInfo
from kvblend_rag.errors import ConfigError
from kvblend_rag.report import BlendReport, ChunkUse
from kvblend_rag.store import Catalogue
from kvblend_rag.vllm_plugin.scheduler.library import Library

_BLOCK = 16


class FakeShelf:
    """What the connector does in vLLM's processes, on token ids alone.

    Args:
        store_path: the store's folder; None: nothing is stored and nothing found.
        info: the engine's.
    """

    def __init__(self, store_path: str | Path | None, info: EngineInfo) -> None:
        self._catalogue = None if store_path is None else Catalogue(store_path)
        self._library = None
        if store_path is not None:
            self._library = Library(BlendConfig(store_path=str(store_path)), info.fingerprint, info.context)
        self._waiting: dict[str, tuple[str, TokenIds]] = {}
        self._prompts: list[TokenIds] = []
        self._accounts: dict[str, dict[str, float | None]] = {}

    def keep(self, prompt: TokenIds, ingest: dict[str, Any]) -> None:
        """A chunk was computed: it is stored by the next ``flush``."""
        self._waiting[ingest["key"]] = (ingest["namespace"], as_token_ids(prompt[ingest["start"] :]))

    def call(self, method: str, *arguments: Any) -> Any:
        """A worker's maintenance method."""
        if method == "flush":
            failed = {}
            for key, (namespace, tokens) in self._waiting.items():
                if self._catalogue is None:
                    failed[key] = "this FakeEngine has no store: give it a store_path"
                else:
                    self._catalogue.add(key, namespace, tokens, 0, 1, 4 * len(tokens))
            self._waiting.clear()
            return failed
        if method == "prefetch":
            missing = arguments[0] if self._catalogue is None else self._catalogue.missing(arguments[0])
            return len(set(arguments[0]) - set(missing))
        if method == "forget":
            return [] if self._catalogue is None else self._catalogue.remove(arguments[0], unless_held=True)
        if method == "account":
            return self._accounts.get(arguments[0])
        if method == "tiers":
            return []
        raise ConfigError(f"A FakeEngine has no method {method!r}.")

    def report(self, request_id: str, prompt: TokenIds, options: dict[str, Any]) -> BlendReport:
        """What would have been reused of a prompt, everything as stored; the last token is always computed."""
        most = len(prompt) - 1
        cached = min(max((_common(prompt, other) for other in self._prompts), default=0), most) // _BLOCK * _BLOCK
        self._prompts.append(prompt)
        uses = []
        if self._library is not None and options.get("blend") is not False:
            for match in self._library.match(options.get("tenant", ""), prompt):
                start, stop = max(match.start, cached), min(match.stop, most)
                if start < stop:
                    uses.append(ChunkUse(key=match.key, start=start, tokens=stop - start, tier="memory"))
        reused = sum(use.tokens for use in uses)
        if uses:
            self._accounts[request_id] = {"uncovered": None, "moved": None}
        return BlendReport(
            request_id=request_id,
            prompt_tokens=len(prompt),
            cached_tokens=cached,
            reused_tokens=reused,
            computed_tokens=len(prompt) - cached - reused,
            blended=bool(uses),
            reason=None if uses else "no stored chunk stands in the prompt",
            selector="none" if uses else "",
            chunks=tuple(uses),
        )

    def forget_prompts(self) -> None:
        """Empty the prefix cache."""
        self._prompts.clear()

    def close(self) -> None:
        """Close the catalogue."""
        if self._catalogue is not None and self._library is not None:
            self._catalogue.close()
            self._library.close()


def _common(one: TokenIds, other: TokenIds) -> int:
    shared = min(len(one), len(other))
    differs = np.flatnonzero(one[:shared] != other[:shared])
    return int(differs[0]) if len(differs) else shared


__all__ = ["FakeShelf"]
