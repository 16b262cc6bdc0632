"""Where the KV of chunks lives: tiers of tensors by key, and the catalogue beside them.

Reading order: base, layout, chunk_file, memory, disk, remote, valkey, s3, tiered, catalogue, upkeep, sync,
open. Names are
imported on first use, so that the catalogue can be read without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvblend_rag.store.base import ChunkStore, StoredChunk
    from kvblend_rag.store.catalogue import Catalogue
    from kvblend_rag.store.disk import DiskStore
    from kvblend_rag.store.layout import StoreLayout
    from kvblend_rag.store.memory import MemoryStore
    from kvblend_rag.store.open import layout_of, open_catalogue, open_remote, open_store
    from kvblend_rag.store.tiered import TieredStore

_HOMES = {
    "Catalogue": "catalogue",
    "ChunkStore": "base",
    "DiskStore": "disk",
    "MemoryStore": "memory",
    "StoreLayout": "layout",
    "StoredChunk": "base",
    "TieredStore": "tiered",
    "layout_of": "open",
    "open_catalogue": "open",
    "open_remote": "open",
    "open_store": "open",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


__all__ = [
    "Catalogue",
    "ChunkStore",
    "DiskStore",
    "MemoryStore",
    "StoreLayout",
    "StoredChunk",
    "TieredStore",
    "layout_of",
    "open_catalogue",
    "open_remote",
    "open_store",
]
