"""Library: the chunks that stand ready, by tenant, as the catalogue tells; what prompts are matched with."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvblend_rag.blend.chunk import TokenIds, as_token_ids, namespace
from kvblend_rag.blend.match import ChunkIndex, Match
from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import ChunkRejected
from kvblend_rag.store import Catalogue, open_catalogue


@dataclass
class _Shelf:
    space: str
    index: ChunkIndex = field(default_factory=ChunkIndex)
    cursor: int = 0


class Library:
    """Chunk indexes that follow the catalogue, whoever writes to it."""

    def __init__(self, config: BlendConfig, fingerprint: str, context: tuple[int, ...]) -> None:
        self._catalogue: Catalogue = open_catalogue(config)
        self._fingerprint = fingerprint
        self.context = as_token_ids(context)
        """Token ids of the ingest context."""
        self._min_run = config.min_run
        self._shelves: dict[str, _Shelf] = {}
        self._stale: set[str] = set()

    def namespace(self, tenant: str) -> str:
        """The namespace of a tenant's chunks for this model and ingest context."""
        return self._shelf(tenant).space

    def match(self, tenant: str, prompt: TokenIds) -> list[Match]:
        """The runs of the tenant's chunks that stand in a prompt."""
        shelf = self._shelf(tenant)
        if self._catalogue.changed():
            self._stale.update(self._shelves)
        if tenant in self._stale:
            self._follow(shelf)
            self._stale.discard(tenant)
        return shelf.index.match(prompt, self._min_run)

    def size(self, tenant: str) -> int:
        """How many of the tenant's chunks are known now."""
        return len(self._shelf(tenant).index)

    def close(self) -> None:
        """Close the catalogue."""
        self._catalogue.close()

    def _shelf(self, tenant: str) -> _Shelf:
        if tenant not in self._shelves:
            self._shelves[tenant] = _Shelf(namespace(self._fingerprint, self.context, tenant))
            self._stale.add(tenant)
        return self._shelves[tenant]

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
