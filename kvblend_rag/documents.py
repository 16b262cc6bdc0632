"""DocumentSync: keeps the store's chunks in step with a retriever's documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvblend_rag.ingest import IngestReport
from kvblend_rag.kvblend import KVBlend
from kvblend_rag.report import BlendReport


class DocumentSync:
    """Precomputes what is added, releases what is deleted, prefetches what is retrieved.

    Documents are known by id; chunks are content-addressed and stay as long as any document holds them.
    A model that can't be blended is warned of once; documents are then passed over.

    Args:
        kv: engine and store.
        background: work in a thread of its own; ``flush`` waits for it and raises its errors.
        capacity: documents that may wait; adding more blocks until there is room.
        batch: documents computed together.
        progress: show a progress bar.
    """

    def __init__(
        self,
        kv: KVBlend,
        *,
        background: bool = False,
        capacity: int = 1024,
        batch: int = 64,
        progress: bool = False,
    ) -> None:
        raise NotImplementedError

    def add(self, ids: Sequence[str], texts: Sequence[str]) -> IngestReport | None:
        """Add documents, or replace those of the same ids: chunks only the old text had are let go.

        Args:
            ids: one a text; texts of one id belong together.
            texts: as they will stand in a prompt.

        Returns:
            What was done; None in background mode.

        Raises:
            StoreError: the store can't be written; in background mode ``flush`` raises it.
        """
        raise NotImplementedError

    update = add

    def delete(self, ids: Sequence[str]) -> int | None:
        """Forget documents; returns how many chunks that nobody else holds were deleted (None in background mode)."""
        raise NotImplementedError

    def prefetch(self, texts: Sequence[str]) -> int | None:
        """Bring the chunks of retrieved texts into the fastest tier; never raises, never waits for the engine to
        start. Returns how many are there now (None in background mode)."""
        raise NotImplementedError

    def adopt(
        self, documents: Iterable[tuple[str, str]], *, total: int | None = None, progress: bool = True
    ) -> IngestReport:
        """Precompute an index that exists already, in batches; called again, it goes on where it stopped.

        Args:
            documents: ids and texts; read as they are needed.
            total: how many, for the progress bar.
            progress: show a progress bar.
        """
        raise NotImplementedError

    @property
    def pending(self) -> int:
        """Documents that still wait in background mode."""
        raise NotImplementedError

    def flush(self) -> IngestReport:
        """Wait until nothing is pending; returns what was done since the last flush.

        Raises:
            KVBlendError: the first thing that went wrong in the background since the last flush.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Flush and end the thread; a second call does nothing."""
        raise NotImplementedError

    def __enter__(self) -> DocumentSync:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


@dataclass(frozen=True, kw_only=True)
class DocumentUse:
    """What became of one retrieved document in a prompt."""

    found: str
    """``fully``, ``partly`` or ``not``."""
    tokens: int
    """Tokens of its chunks that were found in the prompt."""
    of: int
    """Tokens of its chunks."""
    reused: int
    """Tokens whose stored KV was used, recomputed ones included."""
    reason: str | None = None
    """Why not all: ``not ingested``, ``too short``, ``cut by the splitter``, ``escaped by the chat template``,
    ``not in the prompt``, or what the report says."""


def which_found(
    kv: KVBlend, report: BlendReport, texts: Sequence[str], prompt_token_ids: Sequence[int]
) -> list[DocumentUse]:
    """Which retrieved texts were found in a prompt, and why not the others; one entry a text."""
    raise NotImplementedError


__all__ = ["DocumentSync", "DocumentUse", "which_found"]
