"""Library: the chunks that stand ready, by tenant, as the catalogue tells; what prompts are matched with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from kvblend_rag.blend.chunk import TokenIds, as_token_ids, chunk_key, namespace
from kvblend_rag.blend.context import CONTEXT_TOKENS
from kvblend_rag.blend.match import ChunkIndex, Match
from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import ChunkRejected
from kvblend_rag.store import Catalogue, open_catalogue


@dataclass
class _Openings:
    """Chunks that were computed behind the header as well."""

    space: str
    keys: set[str] = field(default_factory=set)
    cursor: int = 0


@dataclass
class _Shelf:
    space: str
    openings: _Openings | None
    index: ChunkIndex = field(default_factory=ChunkIndex)
    cursor: int = 0


class Library:
    """Chunk indexes that follow the catalogue, whoever writes to it."""

    def __init__(
        self, config: BlendConfig, fingerprint: str, context: tuple[int, ...], header: tuple[int, ...] | None = None
    ) -> None:
        self._catalogue: Catalogue = open_catalogue(config)
        self._fingerprint = fingerprint
        self.context = as_token_ids(context)
        """Token ids of the ingest context."""
        self.header = None if header is None else as_token_ids(header)
        """Token ids of the header that openings are computed behind; None where there are none."""
        self._min_run = config.min_run
        self._shelves: dict[str, _Shelf] = {}
        self._stale: set[str] = set()

    def contexts(self, tenant: str) -> dict[str, TokenIds]:
        """What a tenant's chunks are computed behind, by the namespaces of their keys."""
        shelf = self._shelf(tenant)
        found = {shelf.space: self.context}
        if shelf.openings is not None and self.header is not None:
            found[shelf.openings.space] = self.header
        return found

    def match(self, tenant: str, prompt: TokenIds, openings: bool = True) -> list[Match]:
        """The runs of the tenant's chunks that stand in a prompt.

        Args:
            tenant: whose.
            prompt: token ids, int32, shape (tokens,).
            openings: take the first run as it is computed behind the header, where it stands near the beginning.
        """
        shelf = self._shelf(tenant)
        if self._catalogue.changed():
            self._stale.update(self._shelves)
        if tenant in self._stale:
            self._follow(shelf)
            if shelf.openings is not None:
                self._follow_openings(shelf.openings)
            self._stale.discard(tenant)
        runs = shelf.index.match(prompt, self._min_run)
        if openings and runs and shelf.openings is not None:
            runs[0] = self._as_opening(runs[0], prompt, shelf.index, shelf.openings)
        return runs

    def size(self, tenant: str) -> int:
        """How many of the tenant's chunks are known now."""
        return len(self._shelf(tenant).index)

    def close(self) -> None:
        """Close the catalogue."""
        self._catalogue.close()

    def _shelf(self, tenant: str) -> _Shelf:
        if tenant not in self._shelves:
            header = self.header
            openings = None if header is None else _Openings(namespace(self._fingerprint, header, tenant))
            self._shelves[tenant] = _Shelf(namespace(self._fingerprint, self.context, tenant), openings)
            self._stale.add(tenant)
        return self._shelves[tenant]

    def _as_opening(self, run: Match, prompt: TokenIds, index: ChunkIndex, openings: _Openings) -> Match:
        """The run with its chunk's KV behind the header, if there is one and nothing much stands in front of it."""
        assert self.header is not None
        at = len(self.header)
        if run.start > max(CONTEXT_TOKENS, at):
            return run
        key = chunk_key(openings.space, index.tokens(run.key))
        if key not in openings.keys:
            return run
        exact = run.start == at and run.chunk_start == 0 and np.array_equal(prompt[:at], self.header)
        return replace(run, key=key, behind=at, exact=exact)

    def _follow_openings(self, openings: _Openings) -> None:
        changes = self._catalogue.changes_since(openings.cursor, openings.space)
        if changes.reset:
            openings.keys = set()
        openings.keys.difference_update(changes.removed)
        openings.keys.update(key for key, _ in changes.added)
        openings.cursor = changes.cursor

    def _follow(self, shelf: _Shelf) -> None:
        changes = self._catalogue.changes_since(shelf.cursor, shelf.space)
        if changes.reset:
            shelf.index = ChunkIndex()
        for key in changes.removed:
            shelf.index.discard(key)
        try:
            shelf.index.add_many(changes.added)
        except ChunkRejected:  # stored under another window: the long enough ones still serve
            for key, tokens in changes.added:
                try:
                    shelf.index.add(key, tokens)
                except ChunkRejected:
                    continue
        shelf.cursor = changes.cursor


__all__ = ["Library"]
