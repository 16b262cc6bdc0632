"""The store and the catalogue that a configuration asks for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlunsplit

from kvblend_rag.address import RemoteAddress
from kvblend_rag.config import BlendConfig
from kvblend_rag.store.catalogue import Catalogue
from kvblend_rag.store.layout import Shard, StoreLayout
from kvblend_rag.store.seal import Seal

if TYPE_CHECKING:
    from kvblend_rag.store.remote import RemoteStore
    from kvblend_rag.store.tiered import TieredStore

_GIB = 1 << 30


def open_store(config: BlendConfig, shard: Shard = (0, 1), pin: bool = False, decoding: bool = True) -> TieredStore:
    """The chunk store: ``cpu`` puts host memory in front of the disk, and ``remote`` tiers stand behind it.

    Args:
        config: where, and how large.
        shard: tensor-parallel (rank, size).
        pin: keep the chunks in memory page-locked; needs CUDA.
        decoding: give KV decoded, and hold it so; else as it lies in files (``EncodedKV``).

    Raises:
        StoreError: the folder or its catalogue can't be made or read.
        ConfigError: a remote tier's client is not installed, or its address can't be used.
    """
    # here, so that the catalogue opens without torch
    from kvblend_rag.store.base import ChunkStore
    from kvblend_rag.store.disk import DiskStore
    from kvblend_rag.store.memory import MemoryStore
    from kvblend_rag.store.tiered import TieredStore

    tiers: list[ChunkStore] = []
    if config.local_device == "cpu":
        tiers.append(MemoryStore(int(config.max_memory_gb * _GIB), pin=pin, eviction=config.eviction))
    remote = open_remote(config, shard, decoding)
    catalogue = open_catalogue(config)
    # what leaves the disk may still stand in a remote tier, so its row is then not the disk's to drop
    tiers.append(
        DiskStore(
            dataclasses.replace(layout_of(config), decoding=decoding),
            shard=shard,
            max_bytes=int(config.max_disk_gb * _GIB),
            catalogue=None if remote else catalogue,
        )
    )
    return TieredStore([*tiers, *remote], catalogue=catalogue if remote else None)


def open_remote(config: BlendConfig, shard: Shard = (0, 1), decoding: bool = True) -> list[RemoteStore]:
    """The remote tiers, the fastest first; nothing is asked of the servers yet.

    Args:
        config: which, and how large.
        shard: tensor-parallel (rank, size).
        decoding: as ``open_store`` takes it.

    Raises:
        ConfigError: a client's package is missing, or an address can't be used.
    """
    layout = dataclasses.replace(layout_of(config), decoding=decoding)
    return [_open_remote(RemoteAddress.parse(url), layout, shard) for url in config.remote]


def _open_remote(address: RemoteAddress, layout: StoreLayout, shard: Shard) -> RemoteStore:
    url, options = address.url, address.options
    if url.scheme == "s3":
        from kvblend_rag.store.s3 import S3Store

        return S3Store(
            url.netloc,
            url.path.strip("/"),
            layout,
            shard=shard,
            max_bytes=address.max_bytes,
            timeout_s=address.timeout_s,
            endpoint=options.get("endpoint"),
            region=options.get("region"),
        )
    from kvblend_rag.store.valkey import ValkeyStore

    return ValkeyStore(
        urlunsplit(url),
        options.get("prefix", "kvblend"),
        layout,
        shard=shard,
        max_bytes=address.max_bytes,
        timeout_s=address.timeout_s,
    )


def open_catalogue(config: BlendConfig) -> Catalogue:
    """The catalogue beside the store, on connections of its own.

    Raises:
        StoreError: it can't be made or read, or is damaged.
    """
    return Catalogue(layout_of(config))


def layout_of(config: BlendConfig) -> StoreLayout:
    """Where the store is, how KV is encoded, the key that it is encrypted with, and what leaves first.

    Raises:
        ConfigError: the key can't be read, or the package for it is missing.
    """
    seal = Seal.from_source(config.encryption_key) if config.encryption_key else None
    return StoreLayout(Path(config.store_path), encoding=config.encoding, seal=seal, eviction=config.eviction)


__all__ = ["layout_of", "open_catalogue", "open_remote", "open_store"]
