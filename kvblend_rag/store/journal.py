"""Journal: what documents hold, once more beside the catalogue, so that a lost catalogue loses no document.

One JSON list a line, behind a digest of itself; lines are only appended, in the order of the catalogue's
transactions, and a line that was half written or damaged is passed over.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvblend_rag.store.layout import StoreLayout, store_error, sync_folder

_DIGITS = 16


@dataclass
class Holds:
    """What a journal says when it is read to its end."""

    documents: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    """Keys, by tenant and document."""
    members: set[tuple[str, str, str]] = field(default_factory=set)
    """Tenant, group, document."""
    damaged: int = 0
    """Lines that are not what was written."""

    def apply(self, record: list[Any]) -> None:
        """Take in one record."""
        match record:
            case ["hold", str(tenant), str(document), list(keys)]:
                self.documents.setdefault((tenant, document), set()).update(map(str, keys))
            case ["let_go", str(tenant), str(document)]:
                self.documents.pop((tenant, document), None)
            case ["join", str(tenant), list(groups)]:
                self.members |= {(tenant, str(group), str(document)) for group, document in groups}
            case ["leave", str(tenant), str(document)]:
                self.members = {each for each in self.members if (each[0], each[2]) != (tenant, document)}
            case _:
                self.damaged += 1

    def records(self) -> list[list[Any]]:
        """The fewest records that say the same."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for tenant, group, document in sorted(self.members):
            groups.setdefault(tenant, []).append((group, document))
        holds = sorted(self.documents.items())
        return [
            *(["hold", *document, sorted(keys)] for document, keys in holds if keys),
            *(["join", tenant, pairs] for tenant, pairs in groups.items()),
        ]


class Journal:
    """The journal of the store at ``layout``. Not locked: call it inside the catalogue's write transaction.

    Raises (every method):
        StoreFull: no space is left.
        StoreError: the file can't be read or written.
    """

    def __init__(self, layout: StoreLayout) -> None:
        self._path = layout.journal

    def exists(self) -> bool:
        """Whether there is a file."""
        return self._path.exists()

    def append(self, *records: list[Any]) -> None:
        """Add records, durable when this returns."""
        if not records:
            return
        try:
            _append(self._path, records)
        except OSError as error:
            raise store_error(error, self._path, "written") from error

    def read(self) -> Holds:
        """All of it; empty when there is no file."""
        holds = Holds()
        try:
            lines = self._path.read_bytes().splitlines()
        except FileNotFoundError:
            return holds
        except OSError as error:
            raise store_error(error, self._path, "read") from error
        for line in filter(None, lines):
            record = _record(line)
            if record is None:
                holds.damaged += 1
            else:
                holds.apply(record)
        return holds

    def rewrite(self, records: Iterable[list[Any]]) -> None:
        """Replace all of it, whole or not at all."""
        temporary = self._path.with_name(f"{self._path.name}.tmp")
        try:
            temporary.unlink(missing_ok=True)
            _append(temporary, records)
            os.replace(temporary, self._path)
            sync_folder(self._path.parent)
        except OSError as error:
            raise store_error(error, self._path, "written") from error


def _append(path: Path, records: Iterable[list[Any]]) -> None:
    data = b"".join(map(_line, records))
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            data = b"\n" + data  # a writer died in the middle of a line
        try:
            while data:
                data = data[os.write(descriptor, data) :]
            os.fdatasync(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, size)  # on a full device half a line is there
            raise
    finally:
        os.close(descriptor)


def _line(record: list[Any]) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()
    return _digest(text) + b" " + text + b"\n"


def _record(line: bytes) -> list[Any] | None:
    digest, _, text = line.partition(b" ")
    if digest != _digest(text):
        return None
    record: list[Any] = json.loads(text)
    return record


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=_DIGITS // 2).hexdigest().encode()


__all__ = ["Holds", "Journal"]
