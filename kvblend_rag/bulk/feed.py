"""Feed: what a row of a data set says: a document to store or to delete, or why it says neither."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kvblend_rag.demo.library import documents_in
from kvblend_rag.errors import ConfigError

UPSERT, DELETE = "upsert", "delete"
_OPERATIONS = {
    **dict.fromkeys(("", UPSERT, "insert", "add", "update", "replace"), UPSERT),
    **dict.fromkeys((DELETE, "remove"), DELETE),
}


@dataclass(frozen=True)
class Columns:
    """Where in a row things stand."""

    id: str = "id"
    text: str = "text"
    operation: str = "operation"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row."""

    source: str
    """File, and line where it has lines."""
    id: str = ""
    operation: str = UPSERT
    """``upsert`` stores a document or replaces the one of that id, ``delete`` forgets it."""
    text: str = ""
    reason: str = ""
    """Why nothing can be done with it."""

    @property
    def id_hash(self) -> int:
        """64 bits of the id; of the source, where nothing can be done with the row: it replaces no other."""
        return _hash("", self.source) if self.reason else _hash(self.id)

    @property
    def digest(self) -> int:
        """64 bits of all that it asks for: of ten million rows, two share theirs with odds of 1 to 370,000."""
        return _hash(self.id, self.operation, self.text, self.source if self.reason else "")


def entry_of(row: Mapping[str, Any], source: str, columns: Columns) -> Entry:
    """What one row says."""
    broken = next((name for name in vars(columns).values() if not _is_text(row.get(name))), None)
    if broken is not None:
        return Entry(source=source, reason=f"column {broken!r} holds half a surrogate pair, which is no character")
    given = row.get(columns.id)
    name = str(given) if isinstance(given, (str, int)) and not isinstance(given, bool) else ""
    if not name:
        return Entry(source=source, reason=f"the row has no id in its column {columns.id!r}", text=_text(row, columns))
    said = row.get(columns.operation)
    operation = _OPERATIONS.get(str(said or "").strip().lower())
    if operation is None:
        reason = f"the operation {said!r} is unknown: upsert and delete are known"
        return Entry(source=source, id=name, text=_text(row, columns), reason=reason)
    if operation == DELETE:
        return Entry(source=source, id=name, operation=DELETE)
    text = row.get(columns.text)
    if not isinstance(text, str):
        return Entry(source=source, id=name, reason=f"the row has no text in its column {columns.text!r}")
    return Entry(source=source, id=name, text=text)


def entries_of_lines(content: bytes, path: str, columns: Columns) -> Iterator[Entry]:
    """What the lines of a JSON lines file say; empty lines say nothing.

    Args:
        content: of the file.
        path: for the entries' sources.
        columns: the names of the fields.
    """
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        source = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:  # bytes that are not UTF-8 too
            yield Entry(source=source, text=line.decode(errors="replace"), reason=f"the line is not JSON: {error}")
            continue
        if isinstance(row, dict):
            yield entry_of(row, source, columns)
        else:
            yield Entry(source=source, text=line.decode(errors="replace"), reason="the line is no JSON object")


def entries_of_file(content: bytes, path: str, folder: str) -> Iterator[Entry]:
    """The documents of a text or Markdown file, with the ids that ``kvblend ingest`` gives them without ``--ray``."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        yield Entry(source=path, reason="the file is not UTF-8 text")
        return
    for document in documents_in(os.path.relpath(path, folder).replace(os.sep, "/"), text):
        yield Entry(source=path, id=f"{folder}{os.sep}{document.id}", text=document.content)


def check_columns(found: list[str], columns: Columns, path: str) -> None:
    """Refuse a table without ids or texts: each of its rows would be a dead letter.

    Raises:
        ConfigError: a column is missing; those that are there are named.
    """
    missing = [name for name in (columns.id, columns.text) if name not in found]
    # a feed of deletions has no texts
    if columns.id in missing or (missing and columns.operation not in found):
        raise ConfigError(
            f"{path} has no column {missing[0]!r}, and {', '.join(found)}: name them by --id-column and --text-column."
        )


def _is_text(value: Any) -> bool:
    return not isinstance(value, str) or not any("\ud800" <= char <= "\udfff" for char in value)


def _text(row: Mapping[str, Any], columns: Columns) -> str:
    text = row.get(columns.text)
    return text if isinstance(text, str) else ""


def _hash(*parts: str) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        raw = part.encode()
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return int.from_bytes(digest.digest(), "little")


__all__ = ["DELETE", "UPSERT", "Columns", "Entry", "check_columns", "entries_of_file", "entries_of_lines", "entry_of"]
