"""Ledger: what a run has dealt with, so that it goes on there when it was interrupted; and what failed, and why."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np

from kvblend_rag.bulk.agenda import Hashes
from kvblend_rag.bulk.feed import Columns, Entry
from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import ConfigError
from kvblend_rag.store.layout import store_error

_SIZE = 8
# What a chunk's key hangs on, and where it goes.
_RELEVANT = (
    "model",
    "engine_args",
    "chunk_size",
    "ingest_context",
    "ingest_documents",
    "ingest_openings",
    "system_prompt",
    "tenant",
    "heed_verdict",
    "remote",
)


class Ledger:
    """Digests of the rows that a run has dealt with, durable once ``add`` returns; gone when the run is complete.

    Args:
        config: another model or store has a ledger of its own.
        data_set: another data set too.

    Raises (every method):
        StoreError: the file can't be read or written.
    """

    def __init__(self, config: BlendConfig, data_set: str) -> None:
        relevant = {name: getattr(config, name) for name in _RELEVANT}
        name = hashlib.blake2b(json.dumps([relevant, data_set], default=str).encode(), digest_size=8).hexdigest()
        self._path = Path(config.store_path) / "ingest" / f"{name}.done"
        self._file: IO[bytes] | None = None

    def done(self) -> Hashes:
        """Digests of an interrupted run; a torn end is left out."""
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            content = b""
        except OSError as error:
            raise store_error(error, self._path, "read") from error
        return np.frombuffer(content[: len(content) // _SIZE * _SIZE], dtype="<u8").astype(np.uint64)

    def add(self, digests: Iterable[int]) -> None:
        """Put rows on record."""
        content = np.fromiter(digests, dtype="<u8").tobytes()
        if not content:
            return
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("ab")
                self._file.truncate(self._file.tell() // _SIZE * _SIZE)
            self._file.write(content)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise store_error(error, self._path, "written") from error

    def complete(self) -> None:
        """All is done: the next run looks at every row anew."""
        self.close()
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Keep the record for the next run."""
        if self._file is not None:
            self._file.close()
            self._file = None


class DeadLetters:
    """Rows that failed, as JSON lines; a data set itself, to be ingested once what was wrong is mended.

    Args:
        path: made when the first row fails; an older one is removed.
        columns: the names of the fields.

    Raises (every method):
        ConfigError: the file can't be written.
    """

    def __init__(self, path: Path, columns: Columns) -> None:
        self.path, self._columns, self.count = path, columns, 0
        self._file: IO[str] | None = None
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise self._explain(error) from error

    def add(self, entries: Iterable[Entry]) -> None:
        """Write rows with the reasons why they failed."""
        names = self._columns
        try:
            for each in entries:
                if self._file is None:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    self._file = self.path.open("w", encoding="utf-8")
                row = {names.id: each.id, names.operation: each.operation, names.text: each.text}
                print(
                    json.dumps({**row, "reason": each.reason, "source": each.source}, ensure_ascii=False),
                    file=self._file,
                    flush=True,
                )
                self.count += 1
        except OSError as error:
            raise self._explain(error) from error

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _explain(self, error: OSError) -> ConfigError:
        return ConfigError(f"{self.path} can't be written ({error.strerror}): name another by --dead-letters.")


__all__ = ["DeadLetters", "Ledger"]
