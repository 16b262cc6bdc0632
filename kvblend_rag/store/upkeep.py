"""Upkeep of a store: ``check`` finds and mends what is wrong, ``gc`` removes what nobody needs.

Both may run beside servers that use the store, save for the repair of a damaged catalogue.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvblend_rag.store.catalogue import Catalogue
from kvblend_rag.store.check import CheckResult, check, existing, unlink, with_bar
from kvblend_rag.store.disk import DiskStore
from kvblend_rag.store.layout import StoreLayout
from kvblend_rag.store.remote import RemoteStore
from kvblend_rag.store.tiered import TieredStore

_BATCH = 256


@dataclass(frozen=True)
class GcResult:
    """What ``gc`` removed."""

    unheld: list[str]
    """Keys of chunks that no document held."""
    over_bound: list[str]
    """Keys of chunks used longest ago, beyond the bound."""
    temporaries: int
    quarantined: int
    nbytes: int
    """Bytes freed on the disk."""

    def summary(self) -> str:
        """What was done, in one sentence."""
        return (
            f"Removed {len(self.unheld)} chunks that no document holds, "
            f"{len(self.over_bound)} over the bound, {self.temporaries} half-written "
            f"and {self.quarantined} damaged files: "
            f"{self.nbytes / 2**20:,.1f} MiB."
        )


def gc(
    root: str | Path | StoreLayout,
    max_bytes: int | None = None,
    progress: bool = False,
    remote: Sequence[RemoteStore] = (),
) -> GcResult:
    """Remove chunks that no document holds, leftovers, and what exceeds the bound.

    Chunks ingested without a document are held anonymously, so only the bound removes them.

    Args:
        root: the store's folder.
        max_bytes: bound on the chunk files; those used longest ago leave first.
        progress: show a bar.
        remote: remote tiers behind the disk, from which unheld chunks go too; each keeps its own bound.

    Raises:
        StoreError: there is no store, its catalogue is damaged, or it can't be written.
    """
    layout = existing(root)
    catalogue = Catalogue(layout)
    disk = DiskStore(layout, catalogue=None if remote else catalogue)
    with contextlib.closing(TieredStore([disk, *remote], catalogue if remote else None)) as store:
        before = disk.nbytes()
        keys = catalogue.unheld()
        batches = [keys[start : start + _BATCH] for start in range(0, len(keys), _BATCH)]
        unheld = [key for batch in with_bar(batches, "gc", progress) for key in store.delete_unheld(batch)]
        catalogue.tidy_journal()
        over_bound = disk.evict(max_bytes) if max_bytes is not None else []
        freed = before - disk.nbytes()
    temporaries = list(layout.temporaries())
    quarantined = list(layout.damaged.iterdir())
    freed += unlink([*temporaries, *quarantined])
    return GcResult(unheld, over_bound, len(temporaries), len(quarantined), freed)


__all__ = ["CheckResult", "GcResult", "check", "gc"]
