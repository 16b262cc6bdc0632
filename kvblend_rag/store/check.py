"""Check: reads every file and every row of a store, and mends what doesn't fit."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
from tqdm.auto import tqdm

from kvblend_rag.errors import ChunkDamaged, ChunkMissing, StoreError
from kvblend_rag.store.catalogue import Catalogue
from kvblend_rag.store.chunk_file import read_chunk
from kvblend_rag.store.database import CatalogueDamaged
from kvblend_rag.store.disk import DiskStore
from kvblend_rag.store.layout import Shard, StoreLayout, store_error
from kvblend_rag.store.remote import RemoteStore
from kvblend_rag.store.tables import ANONYMOUS, ChunkRow

T = TypeVar("T")
Place: TypeAlias = tuple[str, Shard]


@dataclass
class CheckResult:
    """What ``check`` found; with ``repaired``, it is mended."""

    repaired: bool
    files: int = 0
    """Sound chunk files."""
    nbytes: int = 0
    """Bytes in them."""
    catalogue_problem: str | None = None
    """Why the catalogue can't be read. Repair: put aside and made anew from the journal and the files."""
    damaged_files: list[str] = field(default_factory=list)
    """Names of chunk files that fail their checksum. Repair: put aside, the chunk's row dropped."""
    rows_without_file: list[str] = field(default_factory=list)
    """Names of listed chunk files that are gone. Repair: the row dropped."""
    files_without_row: list[str] = field(default_factory=list)
    """Names of sound files nobody lists. Repair: listed again, held anonymously if by no document."""
    damaged_rows: list[str] = field(default_factory=list)
    """Keys whose row says something else than the file. Repair: the row written anew."""
    temporaries: list[str] = field(default_factory=list)
    """Names of files whose writer died. Repair: deleted."""
    journal_lines: int = 0
    """Damaged lines of the documents' journal. Repair: written anew from the catalogue."""

    @property
    def ok(self) -> bool:
        """Whether nothing was wrong."""
        return self.catalogue_problem is None and not any(count for count, *_ in self._findings())

    def summary(self) -> list[str]:
        """What was found and what was done about it, a sentence each."""
        lines = [f"{self.files} chunk files are sound ({self.nbytes / 2**20:,.1f} MiB)."]
        if self.catalogue_problem:
            done = "The catalogue was put aside and made anew from the chunk files and the documents' journal."
            lines.append(done if self.repaired else self.catalogue_problem)
        lines += [
            f"{count} {what}{f': {done}' if self.repaired else ''}." for count, what, done in self._findings() if count
        ]
        return lines

    def _findings(self) -> list[tuple[int, str, str]]:
        return [
            (len(self.damaged_files), "chunk files are damaged", "put aside, ingest their texts again"),
            (len(self.rows_without_file), "listed chunk files are gone", "no longer listed"),
            (len(self.files_without_row), "chunk files are not listed", "listed again"),
            (len(self.damaged_rows), "rows contradict their file", "written anew"),
            (len(self.temporaries), "half-written files were left behind", "deleted"),
            (self.journal_lines, "lines of the documents' journal are damaged", "written anew"),
        ]


def check(
    root: str | Path | StoreLayout, repair: bool = False, progress: bool = False, remote: Sequence[RemoteStore] = ()
) -> CheckResult:
    """Read every file and every row of a store, and compare them.

    Args:
        root: the store's folder.
        repair: mend what is found.
        progress: show a bar.
        remote: remote tiers behind the disk; what they hold is listed rightly, file or not.

    Raises:
        StoreError: there is no store, or it can't be read (or, to repair it, written).
    """
    layout = existing(root)
    result = CheckResult(repaired=repair)
    sound = _read_all(layout, result, progress)
    temporaries = list(layout.temporaries())
    result.temporaries = [path.name for path in temporaries]
    catalogue = _open_catalogue(layout, result)
    if catalogue is None:
        return result
    with contextlib.closing(catalogue):
        rows = catalogue.rows()
        elsewhere = {(part.key, part.shard) for tier in remote for part in tier.parts()}
        _compare(layout, sound, rows, elsewhere, result)
        result.journal_lines = catalogue.damaged_journal_lines()
        if repair:
            catalogue.tidy_journal()
            _drop_broken(layout, catalogue, elsewhere, result)
            _list_again(layout, catalogue, sound, result)
            unlink(temporaries)
    return result


def existing(root: str | Path | StoreLayout) -> StoreLayout:
    """The layout of a store that is there.

    Raises:
        StoreError: it isn't.
    """
    layout = StoreLayout.of(root)
    if not layout.chunks.is_dir():
        raise StoreError(f"There is no store at {layout.root}: check store_path.")
    return layout


def with_bar(items: list[T], what: str, progress: bool) -> Iterable[T]:
    """The items, with a progress bar when asked for."""
    return tqdm(items, desc=what, unit="file") if progress else items


def unlink(paths: list[Path]) -> int:
    """Delete files; returns the bytes freed.

    Raises:
        StoreError: one can't be deleted.
    """
    freed = 0
    for path in paths:
        try:
            freed += path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise store_error(error, path, "deleted") from error
    return freed


def _read_all(layout: StoreLayout, result: CheckResult, progress: bool) -> dict[Place, ChunkRow]:
    sound = {}
    for path, key, shard in with_bar(list(layout.chunk_files()), "check", progress):
        try:
            chunk = read_chunk(layout, path, key, shard)
        except ChunkMissing:
            continue  # evicted since it was listed
        except ChunkDamaged:
            result.damaged_files.append(path.name)
            continue
        nbytes = chunk.kv.nbytes
        sound[key, shard] = ChunkRow(key, chunk.namespace, chunk.token_ids, *shard, nbytes)
        result.files += 1
        result.nbytes += nbytes
    return sound


def _open_catalogue(layout: StoreLayout, result: CheckResult) -> Catalogue | None:
    try:
        catalogue = Catalogue(layout)
        catalogue.verify()
    except CatalogueDamaged as error:
        result.catalogue_problem = str(error)
        if not result.repaired:
            return None
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                layout.put_aside(layout.catalogue.with_name(layout.catalogue.name + suffix))
        catalogue = Catalogue(layout)
    return catalogue


def _compare(
    layout: StoreLayout, sound: dict[Place, ChunkRow], rows: list[ChunkRow], elsewhere: set[Place], result: CheckResult
) -> None:
    unlisted = dict(sound)
    for row in rows:
        place = (row.key, (row.rank, row.shard_count))
        path = layout.chunk_path(*place)
        written = unlisted.pop(place, None)
        if written is None:
            if not path.is_file() and place not in elsewhere:  # otherwise damaged, or written since
                result.rows_without_file.append(path.name)
        elif row.namespace != written.namespace or not np.array_equal(row.token_ids, written.token_ids):
            result.damaged_rows.append(row.key)
    result.files_without_row += [layout.chunk_path(*place).name for place in unlisted]


def _drop_broken(layout: StoreLayout, catalogue: Catalogue, elsewhere: set[Place], result: CheckResult) -> None:
    stores: dict[tuple[Shard, bool], DiskStore] = {}
    names = (*result.damaged_files, *result.rows_without_file)
    for _, key, shard in filter(None, map(layout.parse, names)):
        keep_row = (key, shard) in elsewhere
        if (shard, keep_row) not in stores:
            listing = None if keep_row else catalogue
            stores[shard, keep_row] = DiskStore(layout, shard=shard, catalogue=listing)
        # reading does what is needed, and leaves alone what a server has renewed meanwhile
        with contextlib.suppress(ChunkDamaged, ChunkMissing):
            stores[shard, keep_row].read(key)


def _list_again(layout: StoreLayout, catalogue: Catalogue, sound: dict[Place, ChunkRow], result: CheckResult) -> None:
    catalogue.remove(result.damaged_rows)
    ranks = {row.key: row.shard_count for row in catalogue.rows()}
    listed = {(row.key, (row.rank, row.shard_count)) for row in catalogue.rows()}
    parts = Counter((key, size) for key, (_, size) in sound)
    # whole chunks first, so that remains of another number of ranks don't displace them
    unlisted = sorted(sound.keys() - listed, key=lambda place: parts[place[0], place[1][1]] < place[1][1])
    again = []
    for key, shard in unlisted:
        if ranks.setdefault(key, shard[1]) == shard[1]:
            again.append(sound[key, shard])
        else:
            unlink([layout.chunk_path(key, shard)])
    keys = {row.key for row in again}
    catalogue.hold(ANONYMOUS, keys - catalogue.held(keys))
    catalogue.add_rows(again)


__all__ = ["CheckResult", "check", "existing", "unlink", "with_bar"]
