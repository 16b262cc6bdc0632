"""DataSet: the rows of parquet files, JSON lines or a folder of texts, through Ray Data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from kvblend_rag.bulk.agenda import Agenda
from kvblend_rag.bulk.feed import Columns, Entry, check_columns, entries_of_file, entries_of_lines, entry_of
from kvblend_rag.demo.library import text_files
from kvblend_rag.errors import ConfigError

Format = Literal["parquet", "jsonl", "text"]
_SUFFIXES: dict[Format, tuple[str, ...]] = {
    "parquet": (".parquet",),
    "jsonl": (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz"),
    "text": (".md", ".markdown", ".txt"),
}
_FIELDS = ("source", "id", "operation", "text", "reason")
Table: TypeAlias = Any
"""A ``pyarrow.Table``."""


@dataclass(frozen=True)
class DataSet:
    """What is read, and how its rows are understood."""

    paths: tuple[str, ...]
    """Files, sorted; or one URL."""
    format: Format
    columns: Columns
    folder: str = ""
    """Of texts: in front of their ids."""

    @classmethod
    def at(cls, location: str, columns: Columns, format: Format | None = None) -> DataSet:
        """The data set at a path or URL.

        Args:
            location: a file or a folder; or a URL of files, as ``s3://bucket/folder``.
            columns: where in a row things stand.
            format: None: as the names of the files tell.

        Raises:
            ConfigError: nothing is there, or nothing that is understood.
        """
        if "://" in location:
            format = format or _format_of(location)
            if format not in ("parquet", "jsonl"):
                raise ConfigError(f"What is at {location} can't be told from its name: give --format parquet or jsonl.")
            return cls((location,), format, columns)
        path = Path(location).expanduser()
        if not path.exists():
            raise ConfigError(f"There is no data set at {location}: give a file or a folder that exists.")
        if path.is_file():
            format = format or _format_of(path.name)
            if format is None:
                raise ConfigError(f"What is in {location} can't be told from its name: give --format.")
            return cls((str(path.resolve()),), format, columns, str(path.resolve().parent))
        found = {each: _files(path, each) for each in ([format] if format else _SUFFIXES)}
        held = [each for each, files in found.items() if files]
        if not held:
            raise ConfigError(f"The folder {location} holds no {' or '.join(found)} files.")
        # a README beside the shards is no reason to ask
        tables = [each for each in held if each != "text"]
        if len(tables) > 1:
            raise ConfigError(f"The folder {location} holds {' and '.join(tables)} files: choose by --format.")
        (chosen,) = tables or held
        return cls(tuple(found[chosen]), chosen, columns, str(path.resolve()))

    def rows(self) -> Any:
        """The rows as a ``ray.data.Dataset`` of an ``Entry``'s fields, its ``id_hash`` and its ``digest``.

        Raises:
            ConfigError: a table lacks a column, or is none.
        """
        import ray.data

        if self.format == "parquet":
            try:
                table = ray.data.read_parquet(list(self.paths), include_paths=True)
                present = list(table.schema().names)
            except (OSError, ValueError) as error:  # Arrow's own errors are among them
                reason = str(error).splitlines()[0]
                raise ConfigError(f"{self.paths[0]} can't be read as parquet: {reason}") from error
            names = self.columns
            check_columns(present, names, self.paths[0])
            wanted = {names.id, names.text, names.operation, "path"} & set(present)
            return table.select_columns(sorted(wanted)).map_batches(self._of_table, batch_format="pyarrow")
        files = ray.data.read_binary_files(list(self.paths), include_paths=True)
        return files.map_batches(self._of_file, batch_format="pyarrow", batch_size=1)

    def _of_table(self, batch: Table) -> Table:
        return table_of(entry_of(row, str(row["path"]), self.columns) for row in batch.to_pylist())

    def _of_file(self, batch: Table) -> Table:
        (row,) = batch.to_pylist()
        if self.format == "text":
            return table_of(entries_of_file(row["bytes"], row["path"], self.folder))
        return table_of(entries_of_lines(row["bytes"], row["path"], self.columns))


def wanted(batch: Table, agenda: Any) -> Table:
    """The rows that an agenda wants.

    Args:
        batch: rows.
        agenda: a reference to it; it lies in Ray's shared memory, once a host.
    """
    import pyarrow as pa
    import ray

    found: Agenda = ray.get(agenda)
    return batch.filter(pa.array(found.wanted(batch["id_hash"].to_numpy(), batch["digest"].to_numpy())))


def table_of(entries: Iterable[Entry]) -> Table:
    """Entries as a table of their fields, ``id_hash`` and ``digest``; also where there are none."""
    import pyarrow as pa

    rows = [
        {**{name: getattr(each, name) for name in _FIELDS}, "id_hash": each.id_hash, "digest": each.digest}
        for each in entries
    ]
    schema = pa.schema([*((name, pa.string()) for name in _FIELDS), ("id_hash", pa.uint64()), ("digest", pa.uint64())])
    return pa.Table.from_pylist(rows, schema=schema)


def entry_from(row: dict[str, Any]) -> Entry:
    """A row of such a table as an entry."""
    return Entry(**{name: row[name] for name in _FIELDS})


def _format_of(name: str) -> Format | None:
    lower = name.lower()
    return next((each for each, suffixes in _SUFFIXES.items() if lower.endswith(suffixes)), None)


def _files(folder: Path, format: Format) -> list[str]:
    if format == "text":
        return [str(file.resolve()) for file in text_files(folder)]
    every = (file for file in sorted(folder.rglob("*")) if not file.name.startswith((".", "_")))
    return [str(file.resolve()) for file in every if file.is_file() and _format_of(file.name) == format]


__all__ = ["DataSet", "Format", "Table", "entry_from", "table_of", "wanted"]
