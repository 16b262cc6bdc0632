"""StoreLayout: which file of a store is where. Knows names and locks, never contents."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from kvblend_rag.errors import StoreError, StoreFull
from kvblend_rag.store.eviction import Eviction, after_use
from kvblend_rag.store.seal import Seal

if TYPE_CHECKING:
    from kvblend_rag.store.encoding import Encoding  # imports torch

Shard: TypeAlias = tuple[int, int]
"""Tensor-parallel (rank, size)."""

_KEY = re.compile(r"[0-9a-f]{32}")
_CHUNK_NAME = re.compile(r"([0-9a-f]{32})\.r(\d+)of(\d+)\.safetensors")
_YOUNG_S = 60.0
_KEPT_ASIDE = 16


class ChunkFile(NamedTuple):
    """A chunk's file, as its name tells."""

    path: Path
    key: str
    shard: Shard


@dataclass(frozen=True)
class StoreLayout:
    """Format 1 of a store's folder.

    ::

        root/
            catalogue.sqlite                        token ids, documents, change log
            chunks/ab/<key>.r0of1.safetensors       one chunk, one rank's heads; ab: the key's first digits
            chunks/ab/<key>.….<random>.tmp          being written; its writer holds a lock on it
            documents.log                           what documents hold, should the catalogue be lost
            damaged/                                the latest few that failed their checksum
            lock                                    held while a file appears or disappears
            synced                                  empty; its time is that of the latest ``sync`` with remote tiers
    """

    root: Path
    version: int = 1
    """What chunk files and the catalogue must carry to be read."""
    encoding: Encoding = "none"
    """How KV is written; what is read says itself how it was."""
    seal: Seal | None = None
    """Encrypts chunk files and token ids; with it, nothing is read that it did not seal."""
    eviction: Eviction = "lru"
    """Which chunks leave a full disk first; their files' times of modification tell (``eviction``)."""
    decoding: bool = True
    """Whether KV is decoded when it is read; a GPU decodes it while it loads, and takes it as it lies."""

    @classmethod
    def of(cls, root: str | Path | StoreLayout) -> StoreLayout:
        """The layout itself, or that of a folder without encryption."""
        return root if isinstance(root, StoreLayout) else cls(Path(root))

    @property
    def catalogue(self) -> Path:
        """The SQLite file."""
        return self.root / "catalogue.sqlite"

    @property
    def journal(self) -> Path:
        """What documents hold, once more."""
        return self.root / "documents.log"

    @property
    def synced(self) -> Path:
        """The file whose time is that of the latest ``sync``."""
        return self.root / "synced"

    @property
    def chunks(self) -> Path:
        """The folder of the chunk files' folders."""
        return self.root / "chunks"

    @property
    def damaged(self) -> Path:
        """The folder for files that failed their checksum."""
        return self.root / "damaged"

    def chunk_path(self, key: str, shard: Shard) -> Path:
        """Where a rank's part of a chunk lies.

        Raises:
            StoreError: the key isn't 32 hexadecimal digits.
        """
        rank, size = shard
        return self._folder(key) / f"{key}.r{rank}of{size}.safetensors"

    def temporary_path(self, path: Path) -> Path:
        """A new name beside ``path``, to be renamed to it."""
        return path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")

    def create(self) -> None:
        """Make the folders that are missing.

        Raises:
            StoreError: no permission, a read-only file system, or something else in the way.
        """
        for folder in (self.root, self.chunks, self.damaged):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                sync_folder(folder.parent)
            except OSError as error:
                raise store_error(error, folder, "created") from error

    def chunk_files(self) -> Iterator[ChunkFile]:
        """Every chunk file; files by other names are passed over."""
        for path in self._entries():
            if file := self.parse(path.name):
                yield file

    def files_of(self, key: str) -> list[Path]:
        """The files of all ranks of one chunk."""
        files = (self.parse(path.name) for path in _listed(self._folder(key)))
        return [file.path for file in files if file is not None and file.key == key]

    def parse(self, name: str) -> ChunkFile | None:
        """The chunk file of this name, if it is one's."""
        match = _CHUNK_NAME.fullmatch(name)
        if match is None:
            return None
        shard = (int(match[2]), int(match[3]))
        return ChunkFile(self.chunk_path(match[1], shard), match[1], shard)

    def temporaries(self) -> Iterator[Path]:
        """Half-written files whose writer is gone."""
        return (path for path in self._entries() if path.suffix == ".tmp" and _abandoned(path))

    def put_aside(self, path: Path) -> None:
        """Move a damaged file out of the way, under a name of its own; only the latest few are kept."""
        for old in sorted(_listed(self.damaged), key=os.path.getctime)[: 1 - _KEPT_ASIDE]:
            old.unlink(missing_ok=True)
        os.replace(path, self.damaged / f"{path.name}.{secrets.token_hex(4)}")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep all other threads and processes from adding or removing files; not reentrant.

        Raises:
            StoreError: the lock file can't be opened for writing.
        """
        path = self.root / "lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise store_error(error, path, "written") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _folder(self, key: str) -> Path:
        return self.chunks / checked_key(key)[:2]

    def _entries(self) -> Iterator[Path]:
        for folder in _listed(self.chunks):
            yield from _listed(folder)


def checked_key(key: str) -> str:
    """The key itself.

    Raises:
        StoreError: it isn't 32 lower-case hexadecimal digits.
    """
    if _KEY.fullmatch(key) is None:
        raise StoreError(f"{key!r} is no chunk key: a key is 32 lower-case hexadecimal digits.")
    return key


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def mark_used(file: Path | int, eviction: Eviction = "lru") -> None:
    """Count a use of a file; to the nanosecond, as the kernel's own clock is coarse."""
    now = time.time_ns()
    number = now if eviction == "lru" else after_use(eviction, os.stat(file).st_mtime_ns, now)
    os.utime(file, ns=(now, number))


def store_error(error: OSError, path: Path, verb: str) -> StoreError:
    """What an operating-system error means for the store: what is wrong and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFull(f"No space is left for {path}: free some, lower max_disk_gb, or choose another store_path.")
    advice = "check the device and the path."
    if error.errno in (errno.EACCES, errno.EPERM):
        advice = "give this user write permission, or choose another store_path."
    elif error.errno == errno.EROFS:
        advice = "mount it writable, or choose another store_path."
    elif error.errno in (errno.EEXIST, errno.ENOTDIR):
        advice = "a file is in the way: choose another store_path."
    return StoreError(f"{path} can't be {verb} ({error.strerror or error}): {advice}")


def _listed(folder: Path) -> list[Path]:
    try:
        return [folder / name for name in os.listdir(folder)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise store_error(error, folder, "read") from error


def _abandoned(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False  # renamed or removed meanwhile, so somebody is at it
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        # a writer locks its file just after creating it, so a very young one says nothing
        return os.fstat(descriptor).st_mtime < time.time() - _YOUNG_S
    finally:
        os.close(descriptor)


__all__ = ["ChunkFile", "Shard", "StoreLayout", "checked_key", "mark_used", "store_error", "sync_folder"]
