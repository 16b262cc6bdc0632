"""``kvblend ingest DIR``: the KV of every document into the store, and an index to find them by."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvblend_rag.commands import terminal
from kvblend_rag.commands.library_index import save_index, saved_documents, with_folder
from kvblend_rag.commands.session import EngineOptions, check_writable, started
from kvblend_rag.demo.library import load_documents

if TYPE_CHECKING:
    from kvblend_rag.bulk.data_set import Format


def run(folder: str, *, engine: EngineOptions, ray: bool = False, **bulk: Any) -> int:
    """Ingest a folder; again, only what changed is computed, and what is gone is let go.

    Args:
        folder: of text and Markdown; a data set with ``ray``.
        engine: model and store.
        ray: ingest in bulk.
        bulk: how; as on the command line.

    Raises:
        KVBlendError: nothing to read, no engine, or a store that can't be written.
    """
    if ray or bulk.get("ray_address"):
        return _in_bulk(folder, engine, **bulk)
    path = Path(folder).expanduser()
    documents = with_folder(load_documents(path), path)
    config = engine.resolve()
    check_writable(config)
    with started(config, verbose=engine.verbose) as llm:
        report = llm.kvblend.replace(
            [document.content for document in documents],
            document_ids=[document.id for document in documents],
            progress=terminal.err().is_terminal,
        )
        before = saved_documents(config)
        inside = f"{path.resolve()}{os.sep}"
        gone = {each.id for each in before if each.id.startswith(inside)} - {each.id for each in documents}
        deleted = llm.kvblend.release(sorted(gone)) if gone else 0
    save_index(config, [*(each for each in before if not each.id.startswith(inside)), *documents])
    console = terminal.out()
    console.print(f"{len(documents)} documents in {report}.")
    for index, reason in report.skipped:
        console.print(f"  not precomputed: {documents[index].id}: {reason}", style="yellow")
    if gone:
        console.print(f"{len(gone)} documents are no longer there: {deleted} chunks deleted.")
    console.print(f'Stored in {config.store_path}. Next: kvblend ask "your question"', style="dim")
    return 0


def _in_bulk(
    location: str,
    engine: EngineOptions,
    *,
    ray_address: str | None,
    engines: int,
    batch: int,
    format: Format | None,
    id_column: str,
    text_column: str,
    operation_column: str,
    dead_letters: str | None,
) -> int:
    from kvblend_rag.bulk.feed import Columns
    from kvblend_rag.bulk.run import Fleet
    from kvblend_rag.commands import ingest_bulk

    return ingest_bulk.run(
        location,
        engine=engine,
        fleet=Fleet(engines=engines, address=ray_address, batch=batch),
        columns=Columns(id_column, text_column, operation_column),
        format=format,
        dead_letters=dead_letters,
    )


__all__ = ["run"]
