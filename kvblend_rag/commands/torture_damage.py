"""Every byte of a stored chunk flipped, every length cut, files swapped, the device full, read-only and gone."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kvblend_rag.commands.torture_kill import make
from kvblend_rag.errors import ChunkDamaged, ChunkMissing, StoreError, StoreFull
from kvblend_rag.store import Catalogue, DiskStore, StoredChunk, StoreLayout
from kvblend_rag.store.listing import put_and_list
from kvblend_rag.store.upkeep import check

_SHARD = (0, 1)
_SHORT = 2
"""Tokens of the chunk that is damaged everywhere."""


def run(root: Path) -> dict[str, Any]:
    """Damage a store in every way.

    Args:
        root: an empty folder.

    Returns:
        JSON-able: ``tried`` and ``refused`` by kind of damage; ``wrong``, a sentence a violation; ``left_out``, what
        this machine does not allow.
    """
    result: dict[str, Any] = {"tried": {}, "refused": {}, "wrong": [], "left_out": []}
    for kind, outcomes in (("damaged", _damages(root / "damage")), ("gone", _gone(root / "gone"))):
        _count(result, kind, outcomes)
    device = root / "device"
    device.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", device], capture_output=True).returncode:
        result["left_out"].append("a full and a read-only device: mounting one needs root")
        return result
    try:
        _count(result, "full", _full(device))
        _count(result, "read-only", _read_only(device))
    finally:
        subprocess.run(["umount", "-l", device], check=True)
    return result


def _count(result: dict[str, Any], kind: str, outcomes: Iterator[str | None]) -> None:
    seen = list(outcomes)
    result["tried"][kind] = len(seen)
    result["refused"][kind] = seen.count(None)
    result["wrong"] += filter(None, seen)


def _damages(root: Path) -> Iterator[str | None]:
    store = DiskStore(root)
    chunk, other = (_short(make(number)) for number in (1, 2))
    store.put(other)
    store.put(chunk)
    layout = StoreLayout(root)
    path, whole = layout.chunk_path(chunk.key, _SHARD), layout.chunk_path(chunk.key, _SHARD).read_bytes()
    stranger = layout.chunk_path(other.key, _SHARD).read_bytes()
    cases = {
        **{f"byte {at} flipped": _flipped(whole, at) for at in range(len(whole))},
        **{f"cut to {length} bytes": whole[:length] for length in range(len(whole))},
        "one byte longer": whole + b"\0",
        "twice": whole + whole,
        "another chunk's": stranger,
        "another chunk's tail": whole[: len(whole) // 2] + stranger[len(stranger) // 2 :],
        "zeros": bytes(len(whole)),
    }
    for name, content in cases.items():
        path.write_bytes(content)
        try:
            store.read(chunk.key)
        except (ChunkDamaged, ChunkMissing):
            yield None
        except Exception as error:
            yield f"{name}: {error!r}"
        else:
            yield f"{name}: was read"
    store.put(chunk)
    yield None if torch.equal(store.get(chunk.key), chunk.decoded()) else "renewed: another chunk is read"


def _gone(root: Path) -> Iterator[str | None]:
    """The folder is taken away under a server, and comes back."""
    catalogue = Catalogue(root)
    store = DiskStore(root, catalogue=catalogue)
    put_and_list(store, catalogue, [make(1)], _SHARD)
    away = root.with_name("away")
    os.rename(root, away)
    yield _refused("reading", lambda: store.read(make(1).key))
    yield _refused("writing", lambda: store.put(make(2)))
    yield None if not root.exists() else "a folder was made where the device was"
    os.rename(away, root)
    yield None if torch.equal(store.get(make(1).key), make(1).decoded()) else "another chunk is read"
    put_and_list(store, catalogue, [make(2)], _SHARD)
    yield None if check(root).ok else "the store is not whole"
    store.close()


def _full(root: Path) -> Iterator[str | None]:
    catalogue = Catalogue(root)
    store = DiskStore(root, catalogue=catalogue)
    kept = []
    try:
        for number in range(10_000):
            catalogue.hold("document", [make(number).key])
            put_and_list(store, catalogue, [make(number)], _SHARD)
            kept.append(number)
        yield "the device was never full"
    except StoreFull:
        yield None
    except StoreError as error:
        yield f"a full device is reported as: {error}"
    for number in kept:
        yield None if torch.equal(store.get(make(number).key), make(number).decoded()) else f"chunk {number} is another"
    yield None if not list(StoreLayout(root).chunks.rglob("*.tmp")) else "something half-written stayed"
    store.delete([make(number).key for number in kept[: len(kept) // 2]])
    put_and_list(store, catalogue, [make(kept[0])], _SHARD)
    found = check(root)
    yield None if found.ok else f"with room again, the store is not whole: {found}"
    store.close()


def _read_only(root: Path) -> Iterator[str | None]:
    store = DiskStore(root)  # without a catalogue, whose open file would keep the device writable
    store.put(make(1))
    subprocess.run(["mount", "-o", "remount,ro", root], check=True, capture_output=True)
    try:
        yield None if torch.equal(store.get(make(1).key), make(1).decoded()) else "another chunk is read"
        yield _refused("writing", lambda: store.put(make(2)))
        yield _refused("deleting", lambda: store.delete([make(1).key]))
        yield _refused("listing", lambda: Catalogue(root))
    finally:
        subprocess.run(["mount", "-o", "remount,rw", root], check=True, capture_output=True)
    store.put(make(2))
    yield None if torch.equal(store.get(make(2).key), make(2).decoded()) else "another chunk is read"
    store.close()


def _refused(what: str, act: Any) -> str | None:
    try:
        act()
    except StoreError:
        return None
    except Exception as error:
        return f"{what}: {error!r}"
    return f"{what} went through"


def _flipped(whole: bytes, at: int) -> bytes:
    return whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]


def _short(chunk: StoredChunk) -> StoredChunk:
    return StoredChunk(chunk.key, chunk.namespace, chunk.token_ids[:_SHORT], chunk.decoded()[:, :, :_SHORT])


__all__ = ["run"]
