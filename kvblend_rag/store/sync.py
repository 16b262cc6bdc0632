"""Sync: the catalogue of this host learns what remote tiers hold, whoever put it there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvblend_rag.store.catalogue import Catalogue
from kvblend_rag.store.check import existing, with_bar
from kvblend_rag.store.layout import Shard, StoreLayout
from kvblend_rag.store.remote import Part, RemoteStore
from kvblend_rag.store.tables import ANONYMOUS, ChunkRow

_BATCH = 256


@dataclass(frozen=True)
class SyncResult:
    """What ``sync`` changed in the catalogue; parts are one rank's, so a chunk has as many as ranks."""

    listed: int
    """Parts that others stored, and that prompts can match from now on."""
    gone: int
    """Parts that were listed and that no tier holds any more."""
    foreign: int
    """Parts whose token ids could not be read, or don't belong to their key; they are left alone."""

    def summary(self) -> str:
        """What was done, in one sentence."""
        foreign = f" {self.foreign} could not be read." if self.foreign else ""
        return f"{self.listed} chunk parts of other hosts are listed now, {self.gone} no longer.{foreign}"


def sync(root: str | Path | StoreLayout, remote: Sequence[RemoteStore], progress: bool = False) -> SyncResult:
    """Compare the catalogue with what the remote tiers hold.

    What is listed anew is held anonymously, so that ``gc`` on this host leaves it to the others.

    Args:
        root: the store's folder on this host; made when it is missing.
        remote: every remote tier that the store has.
        progress: show a bar.

    Raises:
        StoreError: a tier can't be reached, or the catalogue can't be written.
    """
    catalogue = Catalogue(root)
    try:
        # rows before tiers: a chunk is stored before it is listed, so what isn't found then has left
        known = {(row.key, (row.rank, row.shard_count)) for row in catalogue.rows()}
        found: dict[tuple[str, Shard], tuple[Part, RemoteStore]] = {}
        for tier in remote:
            found |= {(part.key, part.shard): (part, tier) for part in tier.parts()}
        layout = existing(root)
        gone = [place for place in known - found.keys() if not layout.chunk_path(*place).is_file()]
        catalogue.remove([key for key, _ in gone])
        fresh = [found[place] for place in found.keys() - known]
        listed = 0
        for start in with_bar(list(range(0, len(fresh), _BATCH)), "sync", progress):
            listed += _list(catalogue, fresh[start : start + _BATCH])
        return SyncResult(listed, len(gone), len(fresh) - listed)
    finally:
        catalogue.close()


def _list(catalogue: Catalogue, parts: Sequence[tuple[Part, RemoteStore]]) -> int:
    rows = []
    for part, tier in parts:
        read = tier.token_ids(part)
        if read is not None:
            rows.append(ChunkRow(part.key, *read, *part.shard, part.nbytes))
    keys = {row.key for row in rows}
    catalogue.hold(ANONYMOUS, keys - catalogue.held(keys))
    catalogue.add_rows(rows)
    return len(rows)


__all__ = ["SyncResult", "sync"]
