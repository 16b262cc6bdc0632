"""``kvblend store``: what is in the store, is it sound, and what can go. No engine is needed."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from kvblend_rag.commands import terminal
from kvblend_rag.commands.library_index import remove_documents
from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import ConfigError, StoreUnreachable
from kvblend_rag.store.layout import StoreLayout, store_error

if TYPE_CHECKING:
    from kvblend_rag.store.remote import RemoteStore

_LISTED = 20


def stats(*, store: str | None = None, config: str | None = None, json: str | None = None) -> int:
    """Print how many chunks, documents and bytes the store holds."""
    settings = _existing(store, config)
    layout = StoreLayout(Path(settings.store_path))
    from kvblend_rag.store import open_catalogue

    catalogue = open_catalogue(settings)
    try:
        documents, counts = catalogue.documents(), catalogue.stats()
    finally:
        catalogue.close()
    remote = _remote_stats(settings)
    result = {
        "store": settings.store_path,
        **counts,
        "bound_bytes": int(settings.max_disk_gb * 2**30),
        "damaged_files": sum(1 for _ in layout.damaged.iterdir()) if layout.damaged.is_dir() else 0,
        "remote": remote,
        "documents": [{"id": each.document_id, "tenant": each.tenant, "chunks": each.chunks} for each in documents],
    }
    console = terminal.prose(json)
    console.print(
        f"{settings.store_path}: {counts['chunks']:,} chunks of {counts['tokens']:,} tokens, "
        f"{counts['bytes'] / 2**20:,.1f} MiB of {settings.max_disk_gb:g} GiB, "
        f"for {counts['namespaces']} combinations of model, ingest context and tenant."
    )
    for tier in remote:
        held = tier["problem"] or f"{tier['bytes'] / 2**20:,.1f} MiB of {tier['bound_bytes'] / 2**30:g} GiB."
        console.print(escape(f"{tier['place']}: {held}"))
    console.print(f"{len(documents)} documents" + (":" if documents else "."))
    for each in documents[:_LISTED]:
        tenant = f"  (tenant {each.tenant})" if each.tenant else ""
        console.print(escape(f"  {each.document_id}: {each.chunks} chunks{tenant}"))
    if len(documents) > _LISTED:
        console.print(f"  … and {len(documents) - _LISTED} more; --json lists all.", style="dim")
    terminal.write_json(result, json)
    return 0


def check(*, repair: bool = False, store: str | None = None, config: str | None = None) -> int:
    """Read every file and every row; 1 when something is wrong and was not mended."""
    settings = _existing(store, config)
    from kvblend_rag.store import layout_of, open_remote, upkeep

    with _closing(open_remote(settings)) as remote:
        result = upkeep.check(layout_of(settings), repair=repair, progress=terminal.err().is_terminal, remote=remote)
    for line in result.summary():
        terminal.out().print(line)
    if result.ok or repair:
        return 0
    terminal.complain("Something is wrong: run `kvblend store check --repair` to mend it.")
    return 1


def gc(*, max_gb: float | None = None, store: str | None = None, config: str | None = None) -> int:
    """Remove what nobody needs."""
    settings = _existing(store, config)
    from kvblend_rag.store import layout_of, open_remote, upkeep

    bound = settings.max_disk_gb if max_gb is None else max_gb
    if bound < 0:
        raise ConfigError(f"--max-gb is {bound:g}, and must be 0 or more.")
    result = upkeep.gc(
        layout_of(settings), int(bound * 2**30), progress=terminal.err().is_terminal, remote=open_remote(settings)
    )
    terminal.out().print(result.summary())
    return 0


def sync(*, every: float | None = None, store: str | None = None, config: str | None = None) -> int:
    """List here what other hosts put into the remote tiers, once or until Ctrl-C.

    Raises:
        ConfigError: no remote tier is configured, or ``every`` is no number of seconds.
    """
    given = {"store_path": str(Path(store).expanduser())} if store else {}
    settings = BlendConfig.load(config, **given)
    if not settings.remote:
        raise ConfigError("There is no remote tier to learn from: set `remote`, as s3://bucket/prefix.")
    if every is not None and not every > 0:
        raise ConfigError(f"--every is {every:g}, and must be above 0.")
    from kvblend_rag.store import layout_of, open_remote
    from kvblend_rag.store.sync import sync

    with _closing(open_remote(settings)) as remote:
        while True:
            try:
                terminal.out().print(sync(layout_of(settings), remote, progress=terminal.err().is_terminal).summary())
            except StoreUnreachable as error:
                if every is None:
                    raise
                terminal.complain(str(error))
            if every is None:
                return 0
            time.sleep(every)


def delete(
    documents: Sequence[str], *, everything: bool = False, store: str | None = None, config: str | None = None
) -> int:
    """Forget documents and the chunks that nobody else holds, or delete the store.

    Raises:
        ConfigError: nothing to delete was named, or a document that the store does not know.
    """
    if bool(documents) == everything:
        raise ConfigError("Name the documents to delete, or --all for the whole store.")
    settings = _existing(store, config)
    if everything:
        _remove(Path(settings.store_path))
        terminal.out().print(f"Deleted {settings.store_path}.")
        return 0
    from kvblend_rag.store import open_catalogue, open_store

    catalogue = open_catalogue(settings)
    stored = open_store(settings)
    try:
        known = {each.document_id for each in catalogue.documents() if each.tenant == settings.tenant}
        unknown = [each for each in documents if each not in known]
        if unknown:
            raise ConfigError(f"The store holds no document {unknown[0]!r}: `kvblend store stats` lists them.")
        free = catalogue.settle({}, documents, settings.tenant)
        gone = stored.delete_unheld(free)
    finally:
        stored.close()
        catalogue.close()
    remove_documents(settings, documents)
    terminal.out().print(f"Forgot {len(documents)} documents and deleted {len(gone)} chunks.")
    return 0


def _remote_stats(settings: BlendConfig) -> list[dict[str, Any]]:
    if not settings.remote:
        return []
    from kvblend_rag.store import open_remote

    found = []
    with _closing(open_remote(settings)) as remote:
        for tier in remote:
            held, problem = None, None
            try:
                held = tier.nbytes()
            except StoreUnreachable as error:
                problem = str(error)
            found.append({"place": tier.place, "bytes": held, "bound_bytes": tier.max_bytes, "problem": problem})
    return found


@contextlib.contextmanager
def _closing(tiers: list[RemoteStore]) -> Iterator[list[RemoteStore]]:
    try:
        yield tiers
    finally:
        for tier in tiers:
            tier.close()


def _existing(store: str | None, config: str | None) -> BlendConfig:
    given = {"store_path": str(Path(store).expanduser())} if store else {}
    settings = BlendConfig.load(config, **given)
    if not StoreLayout(Path(settings.store_path)).catalogue.exists():
        raise ConfigError(f"There is no store at {settings.store_path}: `kvblend ingest DIR` makes one.")
    return settings


def _remove(root: Path) -> None:
    """Our own entries, and the folder if nothing else is in it."""
    layout = StoreLayout(root)
    try:
        with layout.lock():
            for path in (layout.chunks, layout.damaged, root / "index", root / "ingest"):
                if path.exists():
                    shutil.rmtree(path)
            for path in root.glob(f"{layout.catalogue.name}*"):
                path.unlink()
            layout.journal.unlink(missing_ok=True)
            layout.synced.unlink(missing_ok=True)
        (root / "lock").unlink(missing_ok=True)
        if not any(root.iterdir()):
            root.rmdir()
    except OSError as error:
        raise store_error(error, root, "deleted") from error


__all__ = ["check", "delete", "gc", "stats", "sync"]
