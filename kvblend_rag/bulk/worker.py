"""BulkWorker: one engine of a bulk ingest; Ray Data gives it batches of rows."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvblend_rag.bulk.data_set import Table, entry_from
from kvblend_rag.bulk.feed import UPSERT, Entry
from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import ConfigError, EngineUnavailable, KVBlendError, StoreError, StoreFull
from kvblend_rag.kvblend import KVBlend
from kvblend_rag.store import layout_of, open_remote
from kvblend_rag.store.sync import sync

Make = Callable[[BlendConfig], KVBlend]
_PAUSES_S = (1.0, 4.0, 15.0, 60.0)
"""Between attempts to write to a store: a server that restarts is no reason to end a day's work."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one row."""

    entry: Entry
    """With the reason, if it failed."""
    keys: tuple[str, ...] = ()
    computed: int = 0
    """Chunks computed, counted with the first row of a batch, as ``tokens``."""
    tokens: int = 0
    fatal: str = ""
    """The kind of error that ends the run; its sentence is the entry's reason."""
    digest: int = 0
    """The row's; set where the text stays behind."""


class BulkWorker:
    """Has an engine, started with the first document, compute what the store lacks.

    Args:
        config: model and store; the store's folder is this host's own.
        make: makes the handle on engine and store.
        home: ``store_identity`` of the store of whoever keeps the documents; in another one chunks are held by
            nobody in particular, so that it may forget them when they are deleted there.
    """

    def __init__(self, config: BlendConfig, make: Make, home: tuple[str, int, int]) -> None:
        self._config, self._make, self._home = config, make, home
        self._kv: KVBlend | None = None
        self._named = False

    def __call__(self, batch: Table) -> Table:
        """Outcomes, one a row."""
        return table_of(self.outcomes([entry_from(row) for row in batch.to_pylist()]))

    def __del__(self) -> None:  # Ray Data lets an actor's object go before the actor
        with contextlib.suppress(Exception):
            self._close()

    def outcomes(self, entries: Sequence[Entry]) -> list[Outcome]:
        """What became of the rows, in their order."""
        found = {index: Outcome(entry=each) for index, each in enumerate(entries)}
        wanted = [index for index, each in found.items() if not each.entry.reason and each.entry.operation == UPSERT]
        if wanted:
            try:
                stored = self._store([entries[index] for index in wanted])
            except _Stop as stop:
                kind, reason = type(stop.error).__name__, str(stop.error)
                stored = [
                    Outcome(entry=dataclasses.replace(entries[index], reason=reason), fatal=kind) for index in wanted
                ]
            found |= dict(zip(wanted, stored, strict=True))
        return list(found.values())

    def _store(self, entries: Sequence[Entry]) -> list[Outcome]:
        try:
            return self._ingest(entries)
        except KVBlendError as error:
            if isinstance(error, EngineUnavailable):
                self._close()
            if len(entries) > 1:  # the others are to blame for nothing
                return [outcome for each in entries for outcome in self._store([each])]
            return [Outcome(entry=dataclasses.replace(entries[0], reason=str(error)))]

    def _ingest(self, entries: Sequence[Entry]) -> list[Outcome]:
        kv = self._opened()
        for pause in (*_PAUSES_S, None):
            try:
                report = kv.ingest(
                    [each.text for each in entries],
                    document_ids=[each.id for each in entries] if self._named else None,
                    progress=False,
                )
                break
            except StoreError as error:  # no document's fault
                if pause is None or isinstance(error, StoreFull):
                    raise _Stop(error) from error
                time.sleep(pause)
        skipped = dict(report.skipped)
        return [
            Outcome(
                entry=dataclasses.replace(each, reason=skipped.get(index, "")),
                keys=report.keys[index],
                computed=0 if index else report.computed,
                tokens=0 if index else report.tokens,
            )
            for index, each in enumerate(entries)
        ]

    def _opened(self) -> KVBlend:
        if self._kv is None:
            kv = self._make(self._config)
            try:
                self._named = store_identity(self._config) == self._home
                if not self._named and self._config.remote:
                    learn_from_remote(self._config)  # what other hosts have computed is not computed again
                if kv.engine.info.refusal is not None:
                    raise ConfigError(
                        f"Chunks can't be precomputed for {self._config.model}: {kv.engine.info.refusal}."
                    )
            except KVBlendError as error:
                kv.close()
                raise _Stop(error) from error
            self._kv = kv
        return self._kv

    def _close(self) -> None:
        kv, self._kv = self._kv, None
        if kv is not None:
            kv.close()


class _Stop(Exception):
    """What is wrong is no document's fault, and would be wrong with the next one too."""

    def __init__(self, error: KVBlendError) -> None:
        super().__init__(str(error))
        self.error = error


def store_identity(config: BlendConfig) -> tuple[str, int, int]:
    """Tells stores apart: host, device and inode of the store's lock; the store is made if need be.

    Raises:
        StoreError: it can't be made.
    """
    layout = layout_of(config)
    layout.create()
    with layout.lock():
        status = (layout.root / "lock").stat()
    return platform.node(), status.st_dev, status.st_ino


def learn_from_remote(config: BlendConfig) -> None:
    """List here what the remote tiers hold.

    Raises:
        StoreError: a tier can't be reached, or the catalogue can't be written.
    """
    remote = open_remote(config)
    try:
        sync(layout_of(config), remote)
    finally:
        for tier in remote:
            tier.close()


def table_of(outcomes: Sequence[Outcome]) -> Table:
    """Outcomes as a table; texts travel back with what failed alone."""
    import pyarrow as pa

    texts, numbers = ("source", "id", "operation", "text", "reason", "fatal"), ("computed", "tokens")
    rows = [
        {
            **vars(each.entry),
            "text": each.entry.text if each.entry.reason else "",
            "fatal": each.fatal,
            "digest": each.entry.digest,
            "keys": list(each.keys),
            "computed": each.computed,
            "tokens": each.tokens,
        }
        for each in outcomes
    ]
    schema = [*((name, pa.string()) for name in texts), *((name, pa.int64()) for name in numbers)]
    schema += [("digest", pa.uint64()), ("keys", pa.list_(pa.string()))]
    return pa.Table.from_pylist(rows, schema=pa.schema(schema))


def outcome_from(row: dict[str, Any]) -> Outcome:
    """A row of such a table as an outcome."""
    return Outcome(
        entry=entry_from(row),
        keys=tuple(row["keys"]),
        computed=row["computed"],
        tokens=row["tokens"],
        fatal=row["fatal"],
        digest=row["digest"],
    )


__all__ = ["BulkWorker", "Make", "Outcome", "learn_from_remote", "outcome_from", "store_identity", "table_of"]
