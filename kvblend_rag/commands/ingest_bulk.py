"""``kvblend ingest --ray DATASET``: documents by the million, on as many engines as there are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from kvblend_rag.bulk.data_set import DataSet, Format
from kvblend_rag.bulk.feed import Columns
from kvblend_rag.bulk.run import Fleet, Progress, ingest
from kvblend_rag.commands import terminal
from kvblend_rag.commands.session import EngineOptions, check_writable
from kvblend_rag.errors import ConfigError


def run(
    location: str,
    *,
    engine: EngineOptions,
    fleet: Fleet,
    columns: Columns,
    format: Format | None = None,
    dead_letters: str | None = None,
) -> int:
    """Ingest a data set; interrupted, it goes on where it stopped.

    Args:
        location: parquet files, JSON lines or texts: a file, a folder, a URL.
        engine: model and store.
        fleet: where engines run, and how many.
        columns: where in a row things stand.
        format: of the files; None: as their names tell.
        dead_letters: file for rows that fail; None: in the store's folder.

    Returns:
        0, or 1 when rows failed.

    Raises:
        KVBlendError: nothing to read, no Ray, no engine, or a store that can't be written.
    """
    if fleet.engines < 1 or fleet.batch < 1:
        raise ConfigError("--engines and --batch must be 1 or more.")
    config = engine.resolve()
    check_writable(config)
    data_set = DataSet.at(location, columns, format)
    letters = Path(dead_letters) if dead_letters else Path(config.store_path) / "ingest" / "dead-letters.jsonl"
    if str(letters.resolve()) in data_set.paths:
        raise ConfigError(f"{letters} is what is read: name another file for what fails by --dead-letters.")
    console = terminal.out()
    with _bar(terminal.err()) as shown:
        for at in ingest(data_set, config, fleet, letters):
            shown(at)
    console.print(_summary(at))
    if at.failed:
        terminal.complain(
            f"{at.failed:,} rows failed: {letters} has them with the reasons, to be ingested once mended."
        )
    return 1 if at.failed else 0


def _summary(at: Progress) -> str:
    rate = f", {at.tokens / at.seconds:,.0f} tokens/s" if at.tokens and at.seconds else ""
    earlier = f" {at.earlier:,} rows were done earlier or replaced by later ones." if at.earlier else ""
    return (
        f"{at.stored:,} documents stored ({at.computed:,} chunks computed{rate}), {at.deleted:,} forgotten, "
        f"{at.removed:,} chunks removed.{earlier}"
    )


class _Shown:
    """A run on the screen: reading, starting engines, computing."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._task = bars.add_task("Reading what there is to do", total=None, account="")

    def __call__(self, at: Progress) -> None:
        account = f"{at.computed:,} chunks computed, {at.failed:,} failed" if at.rows else "starting engines"
        self._bars.update(self._task, description="Ingesting", total=at.total, completed=at.rows, account=account)


@contextlib.contextmanager
def _bar(console: Console) -> Iterator[_Shown]:
    with Bars(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[account]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bars:
        yield _Shown(bars)


__all__ = ["run"]
