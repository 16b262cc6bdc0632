"""The store and the catalogue that a configuration asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvblend_rag.config import BlendConfig
from kvblend_rag.store.catalogue import Catalogue
from kvblend_rag.store.layout import Shard

if TYPE_CHECKING:
    from kvblend_rag.store.tiered import TieredStore

_GIB = 1 << 30


def open_store(config: BlendConfig, shard: Shard = (0, 1), pin: bool = False) -> TieredStore:
    """The chunk store: ``cpu`` puts host memory in front of the disk, ``disk`` is the disk alone.

    Args:
        config: where, and how large.
        shard: tensor-parallel (rank, size).
        pin: keep the chunks in memory page-locked; needs CUDA.

    Raises:
        StoreError: the folder or its catalogue can't be made or read.
    """
    # here, so that the catalogue opens without torch
    from kvblend_rag.store.base import ChunkStore
    from kvblend_rag.store.disk import DiskStore
    from kvblend_rag.store.memory import MemoryStore
    from kvblend_rag.store.tiered import TieredStore

    tiers: list[ChunkStore] = []
    if config.local_device == "cpu":
        tiers.append(MemoryStore(int(config.max_memory_gb * _GIB), pin=pin))
    tiers.append(
        DiskStore(
            config.store_path,
            shard=shard,
            max_bytes=int(config.max_disk_gb * _GIB),
            catalogue=open_catalogue(config),
        )
    )
    return TieredStore(tiers)


def open_catalogue(config: BlendConfig) -> Catalogue:
    """The catalogue beside the store, on connections of its own.

    Raises:
        StoreError: it can't be made or read, or is damaged.
    """
    return Catalogue(config.store_path)


__all__ = ["open_catalogue", "open_store"]
