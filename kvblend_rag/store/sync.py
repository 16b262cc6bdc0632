"""Sync: this host learns what remote tiers hold, whoever put it there, and what others deleted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvblend_rag.store.catalogue import Catalogue
from kvblend_rag.store.check import existing, with_bar
from kvblend_rag.store.disk import DiskStore
from kvblend_rag.store.layout import StoreLayout, store_error
from kvblend_rag.store.remote import WORD_KEPT_S, Part, RemoteStore
from kvblend_rag.store.tables import ANONYMOUS, ChunkRow

_BATCH = 256


@dataclass(frozen=True)
class SyncResult:
    """What ``sync`` changed on this host; parts are one rank's, so a chunk has as many as ranks."""

    listed: int
    """Parts that others stored, and that prompts can match from now on."""
    gone: int
    """Parts that were listed and that no tier holds any more."""
    foreign: int
    """Parts whose token ids could not be read, or don't belong to their key; they are left alone."""
    deleted: int = 0
    """Chunks that another host deleted, and whose copies here went too."""

    def summary(self) -> str:
        """What was done, in one sentence."""
        foreign = f" {self.foreign} could not be read." if self.foreign else ""
        deleted = f" {self.deleted} chunks were deleted elsewhere, and here." if self.deleted else ""
        return f"{self.listed} chunk parts of other hosts are listed now, {self.gone} no longer.{deleted}{foreign}"


def sync(root: str | Path | StoreLayout, remote: Sequence[RemoteStore], progress: bool = False) -> SyncResult:
    """Compare this host's store with what the remote tiers hold.

    What is listed anew is held anonymously, so that ``gc`` on this host leaves it to the others. A chunk that
    somebody deleted leaves this host too, unless a document of this host holds it. Word of a deletion is kept for
    ``WORD_KEPT_S``; a host that was away for longer keeps only what the tiers hold. Deletions of this host that a
    tier has not heard of (``Catalogue.due``) are made up for first.

    Args:
        root: the store's folder on this host; made when it is missing.
        remote: every remote tier that the store has, the durable one last.
        progress: show a bar.

    Raises:
        StoreError: a tier can't be reached, or the catalogue can't be written.
    """
    catalogue = Catalogue(root)
    layout = existing(root)
    disk = DiskStore(layout, catalogue=catalogue)
    try:
        due = catalogue.due()
        for tier in reversed(remote):
            tier.delete(due)
        catalogue.made_up_for(due)
        # rows before tiers: a chunk is stored before it is listed, so what isn't found then has left
        known = {(row.key, (row.rank, row.shard_count)) for row in catalogue.rows()}
        word = set().union(*(tier.deleted() for tier in remote))
        held = [{(part.key, part.shard): (part, tier) for part in tier.parts()} for tier in remote]
        # the durable tier is written first, so what it lacks is not stored again, whatever a faster one still holds
        durable = {key for key, _ in held[-1]}
        dead = word - durable
        for tier, parts in zip(remote, held, strict=True):
            tier.drop({key for key, _ in parts} & dead)
        found = {place: part for parts in held for place, part in parts.items() if place[0] not in dead}
        here = {key for key, _ in known} | {file.key for file in layout.chunk_files()}
        if _was_away(layout):
            dead |= here - durable
        copies = (here & dead) - catalogue.held(here & dead, anonymously=False)
        disk.delete(copies)
        known = {place for place in known if place[0] not in copies}
        gone = [place for place in known - found.keys() if not layout.chunk_path(*place).is_file()]
        catalogue.remove([key for key, _ in gone])
        fresh = [found[place] for place in found.keys() - known]
        listed = 0
        for start in with_bar(list(range(0, len(fresh), _BATCH)), "sync", progress):
            listed += _list(catalogue, fresh[start : start + _BATCH])
        layout.synced.touch()
        return SyncResult(listed, len(gone), len(fresh) - listed, len(copies))
    except OSError as error:
        raise store_error(error, layout.synced, "written") from error
    finally:
        disk.close()


def _was_away(layout: StoreLayout) -> bool:
    """Whether this host may have missed a deletion."""
    return layout.synced.exists() and time.time() - layout.synced.stat().st_mtime > WORD_KEPT_S


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
