"""Database: one SQLite file for many threads and processes, with errors that say what to do."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from kvblend_rag.errors import StoreError, StoreFull
from kvblend_rag.store.layout import StoreLayout
from kvblend_rag.store.seal import Seal, Sealed

_BUSY_S = 30.0


class CatalogueDamaged(StoreError):
    """The file is no SQLite database any more, or not the catalogue's."""


class Database:
    """A write-ahead-logged file behind two connections: one writes, one reads.

    They are two because ``PRAGMA data_version`` tells only of commits by other connections.
    Commits are fsynced (``synchronous=FULL``): the cheaper NORMAL may lose the last ones in a power cut,
    and an acknowledged ingest must survive one. That is one fsync beside the tensors' two.

    Each use looks whether it is still this file that stands at the path, and turns to another that took its place: a
    device that failed, or turned read-only, is mounted anew. While nothing stands there, what is open still answers.
    """

    def __init__(self, layout: StoreLayout, schema: str, version: int) -> None:
        """Open the file; ``schema`` makes it, or adds to an older one what it lacks.

        Raises:
            StoreError: it is damaged, of a later version, or can't be written.
        """
        self._layout, self._schema, self._format = layout, schema, version
        self._path = layout.catalogue
        self._lock = {True: threading.RLock(), False: threading.RLock()}
        self._openings = 0
        self._closed = False
        self.fresh = self._open()
        """Whether the file was made when it was opened first."""

    def _open(self) -> bool:
        """Open what stands at the path; whether it was made now."""
        with self._explained(), self._layout.lock():  # turning WAL on doesn't wait for other openers
            writer, reader = self._connect(), self._connect()
            (found,) = writer.execute("PRAGMA user_version").fetchone()
            if found > self._format:
                raise StoreError(
                    f"{self._path} has format {found}, and this release reads {self._format}: "
                    "upgrade kvblend-rag, or choose another store_path."
                )
            self._claim(writer, self._layout.seal)
            if found < self._format:
                writer.executescript(f"{self._schema}; PRAGMA user_version = {self._format};")
            self._file = _identity(self._path)
        self._writer, self._reader = writer, reader
        self._openings += 1
        return not found

    def _follow(self) -> None:
        """Turn to another file that stands at the path now."""
        if _identity(self._path) in (self._file, None):
            return
        with self._lock[True], self._lock[False]:
            if self._closed or _identity(self._path) in (self._file, None):  # another thread was faster
                return
            former = self._writer, self._reader
            self._open()
            for connection in former:
                with contextlib.suppress(sqlite3.Error):  # its device may be read-only, or gone
                    connection.close()

    def _claim(self, writer: sqlite3.Connection, seal: Seal | None) -> None:
        """Keep a store that is encrypted from being used without its key, which would look like damage."""
        (owner,) = writer.execute("PRAGMA application_id").fetchone()
        mine = 0 if seal is None else int.from_bytes(seal.key_id, "little", signed=True)
        if owner not in (0, mine):
            raise Sealed(f"{self._path} is encrypted with another key: set encryption_key to the one it was made with.")
        if mine != owner:
            writer.execute(f"PRAGMA application_id = {mine}")

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that no other writer runs beside; an exception undoes it."""
        self._follow()
        with self._lock[True], self._explained():
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A transaction that sees one moment."""
        self._follow()
        with self._lock[False], self._explained():
            self._reader.execute("BEGIN")
            try:
                yield self._reader
            finally:
                if self._reader.in_transaction:
                    self._reader.execute("COMMIT")

    def version(self) -> int:
        """A number that differs whenever somebody committed in between; some 7 µs, so no transaction."""
        self._follow()
        with self._lock[False], self._explained():
            # SQLite counts by connection, and a new one begins anew
            return (self._openings << 32) + int(self._reader.execute("PRAGMA data_version").fetchone()[0])

    def verify(self) -> None:
        """Read the whole file.

        Raises:
            StoreError: it is damaged.
        """
        with self.reading() as sql:
            (answer,) = sql.execute("PRAGMA quick_check(1)").fetchone()
            if answer != "ok":
                raise sqlite3.DatabaseError(answer)

    def close(self) -> None:
        """Close both connections; a second call does nothing."""
        with self._lock[True], self._lock[False]:
            self._closed = True
            self._reader.close()
            self._writer.close()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        return connection

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._explain(error) from error

    def _explain(self, error: sqlite3.Error) -> StoreError:
        # by text: sqlite_errorcode came with Python 3.11
        text = str(error)
        if "is full" in text:
            return StoreFull(f"No space is left for {self._path}: free some, or choose another store_path.")
        if "locked" in text:
            return StoreError(f"{self._path} has been locked for {_BUSY_S:.0f} s by another process: try again.")
        if "readonly" in text or "unable to open" in text:
            return StoreError(
                f"{self._path} can't be written: give this user write permission, or choose another store_path."
            )
        if "closed" in text:
            return StoreError(f"{self._path} was closed: open the store again.")
        if "disk I/O" in text:
            return StoreError(f"{self._path} can't be read or written ({text}): check the device.")
        return CatalogueDamaged(
            f"The catalogue {self._path} is damaged ({text}): stop what uses the store and run "
            "`kvblend store check --repair`, which rebuilds it from the chunk files."
        )


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and number of the file at a path; None where none is."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


__all__ = ["CatalogueDamaged", "Database"]
