"""Run: a data set through several engines into one store; documents are kept here, engines only compute."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import kvblend_rag.errors as errors
from kvblend_rag.bulk.agenda import Agenda, Hashes
from kvblend_rag.bulk.data_set import DataSet, wanted
from kvblend_rag.bulk.feed import DELETE
from kvblend_rag.bulk.ledger import DeadLetters, Ledger
from kvblend_rag.bulk.worker import BulkWorker, Make, Outcome, learn_from_remote, outcome_from, store_identity
from kvblend_rag.config import BlendConfig
from kvblend_rag.kvblend import KVBlend
from kvblend_rag.store import Catalogue, TieredStore, open_catalogue, open_store

_CAUSE = re.compile(r"^(?:[\w.]+\.)?(\w*(?:Error|Exception): .+)", re.MULTILINE)
_KNOCK_S = 10.0
_RAY_MISSING = "Bulk ingest needs Ray: pip install 'kvblend-rag[ray]'."


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Where engines run, and how many."""

    engines: int = 1
    address: str | None = None
    """Of a Ray cluster; None starts a local one."""
    batch: int = 64
    """Documents that an engine computes together."""
    gpus: int | None = None
    """Of each engine; None: as many as it has ranks, where the cluster has any."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is."""

    total: int
    """Rows to be dealt with."""
    earlier: int
    """Rows that an interrupted run had dealt with, and rows that a later one replaces."""
    stored: int = 0
    """Documents whose chunks are stored now."""
    deleted: int = 0
    """Documents that were forgotten."""
    failed: int = 0
    computed: int = 0
    """Chunks computed; those that were stored already are not."""
    removed: int = 0
    """Chunks that no document holds any more."""
    tokens: int = 0
    """Tokens computed."""
    seconds: float = 0.0

    @property
    def rows(self) -> int:
        """Rows dealt with."""
        return self.stored + self.deleted + self.failed


def ingest(
    data_set: DataSet, config: BlendConfig, fleet: Fleet, dead_letters: Path, make: Make = KVBlend
) -> Iterator[Progress]:
    """Bring a store in step with a data set; interrupted, it goes on where it stopped when called again.

    Args:
        data_set: documents, updates and deletions; of several rows with one id the last counts.
        config: model and store. Documents are kept in the catalogue of the store on this host; engines on
            other hosts have stores of their own, and share chunks through the remote tiers.
        fleet: engines.
        dead_letters: gets the rows that failed, with the reasons.
        make: makes an engine.

    Yields:
        How far it is, after each batch.

    Raises:
        ConfigError: Ray is missing or can't be reached, a column is missing, or engines on several hosts
            share no tier.
        StoreError: a store can't be written, or an engine did not start; what was done stays done.
    """
    columns = data_set.columns
    letters = DeadLetters(dead_letters, columns)
    ledger = Ledger(config, f"{data_set.format} {' '.join(data_set.paths)} {columns}")
    with contextlib.ExitStack() as stack:
        stack.callback(letters.close)
        stack.callback(ledger.close)
        home = store_identity(config)
        if config.remote:
            learn_from_remote(config)
        catalogue = stack.enter_context(contextlib.closing(open_catalogue(config)))
        store = stack.enter_context(contextlib.closing(open_store(config)))
        ray = stack.enter_context(_cluster(fleet, config))
        stack.enter_context(_explained(ray))
        agenda = Agenda.of(*_outline(ray, data_set), ledger.done())
        books = _Books(catalogue, store, ledger, letters, config.tenant)
        began = time.perf_counter()
        at = Progress(total=agenda.total, earlier=agenda.superseded + agenda.settled)
        yield at
        batches = (
            data_set.rows()
            .map_batches(wanted, fn_args=(ray.put(agenda),), batch_format="pyarrow")
            .repartition(target_num_rows_per_block=fleet.batch)
            .map_batches(
                BulkWorker,
                fn_constructor_args=(config, make, home),
                compute=ray.data.ActorPoolStrategy(size=fleet.engines),
                batch_size=fleet.batch,
                batch_format="pyarrow",
                num_cpus=1,
                num_gpus=_gpus(ray, fleet, config),
            )
            .iter_batches(batch_size=None, batch_format="pyarrow")
        )
        for batch in batches:
            settled = books.settle([outcome_from(row) for row in batch.to_pylist()], at)
            at = replace(settled, seconds=time.perf_counter() - began)
            yield at
        if config.remote:
            learn_from_remote(config)
        ledger.complete()


@dataclass(frozen=True)
class _Books:
    """Turns outcomes into documents held and forgotten, and only then puts rows on record as done."""

    catalogue: Catalogue
    store: TieredStore
    ledger: Ledger
    letters: DeadLetters
    tenant: str

    def settle(self, outcomes: list[Outcome], at: Progress) -> Progress:
        fatal = next((each for each in outcomes if each.fatal), None)
        good = [each for each in outcomes if not each.entry.reason]
        bad = [each.entry for each in outcomes if each.entry.reason and not each.fatal]
        gone = [each.entry.id for each in good if each.entry.operation == DELETE]
        held = {each.entry.id: each.keys for each in good if each.entry.operation != DELETE}
        free = self.catalogue.settle(held, gone, self.tenant)
        removed = self.store.delete_unheld(free) if free else []
        self.letters.add(bad)
        self.ledger.add([each.digest for each in good])
        if fatal is not None:
            kind = getattr(errors, fatal.fatal, errors.StoreError)
            raise kind(fatal.entry.reason)
        return replace(
            at,
            stored=at.stored + len(good) - len(gone),
            deleted=at.deleted + len(gone),
            failed=at.failed + len(bad),
            computed=at.computed + sum(each.computed for each in outcomes),
            tokens=at.tokens + sum(each.tokens for each in outcomes),
            removed=at.removed + len(removed),
        )


def _outline(ray: Any, data_set: DataSet) -> tuple[Hashes, Hashes]:
    """Id hashes and digests of all rows in their order, each of shape (rows,)."""
    options = ray.data.DataContext.get_current().execution_options
    options.preserve_order = True
    rows = data_set.rows()  # it keeps the options that it is made with
    options.preserve_order = False
    ids, digests = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
    for batch in rows.select_columns(["id_hash", "digest"]).iter_batches(batch_size=None, batch_format="numpy"):
        ids.append(batch["id_hash"].astype(np.uint64))
        digests.append(batch["digest"].astype(np.uint64))
    return np.concatenate(ids), np.concatenate(digests)


@contextlib.contextmanager
def _cluster(fleet: Fleet, config: BlendConfig) -> Iterator[Any]:
    """Ray, started if it was not, and stopped if it was started."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise errors.ConfigError(_RAY_MISSING) from error
    started = not ray.is_initialized()
    if started:
        _start(ray, fleet)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it raises is said in a sentence
    try:
        hosts = sum(1 for node in ray.nodes() if node["Alive"])
        if hosts > 1 and not config.remote:
            raise errors.ConfigError(
                f"The Ray cluster has {hosts} hosts, and what one computes the others could not load: "
                "set `remote`, as s3://bucket/prefix."
            )
        yield ray
    finally:
        if started:
            ray.shutdown()


def _start(ray: Any, fleet: Fleet) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if fleet.address is None:
            # an engine takes a core, and reading must go on beside all of them
            cores = (os.cpu_count() or 1) + fleet.engines
            ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)
        else:
            _knock(fleet.address)
            ray.init(address=fleet.address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = f"at {fleet.address}" if fleet.address else "on this machine"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise errors.ConfigError(f"Ray {where} can't be used ({reason}): check --ray-address.") from error


def _knock(address: str) -> None:
    """Raise what keeps a connection from being made: Ray itself tries for minutes, and says nothing."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():  # else a name that Ray knows, as `auto`
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()


def _gpus(ray: Any, fleet: Fleet, config: BlendConfig) -> int:
    if fleet.gpus is not None:
        return fleet.gpus
    ranks = int(config.engine_args.get("tensor_parallel_size", 1))
    return ranks if ray.cluster_resources().get("GPU", 0) else 0


@contextlib.contextmanager
def _explained(ray: Any) -> Iterator[None]:
    """What Ray says of a task that failed is a page; one sentence of it is the cause."""
    try:
        yield
    except ray.exceptions.RayError as error:
        causes = [each for each in _CAUSE.findall(str(error)) if not each.startswith(("User", "RayTask"))]
        reason = causes[-1].rstrip(".") if causes else type(error).__name__
        raise errors.StoreError(f"Ray could not go on ({reason}): run the same again to continue.") from error


__all__ = ["Fleet", "Progress", "ingest"]
