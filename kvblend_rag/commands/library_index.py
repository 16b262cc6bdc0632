"""The retrieval index beside a store: what `kvblend ingest` wrote and `kvblend ask` searches."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from kvblend_rag.demo.library import Document
    from kvblend_rag.demo.retriever import Retriever


def index_folder(config: BlendConfig) -> Path:
    """Where the index of this store and tenant lies."""
    return Path(config.store_path) / "index" / (quote(config.tenant, safe="") or "default")


def with_folder(documents: Sequence[Document], folder: Path) -> list[Document]:
    """The documents with ids that tell them from another folder's: the folder's path comes first."""
    from kvblend_rag.demo.library import Document

    return [Document(f"{folder.resolve()}{os.sep}{each.id}", each.title, each.text) for each in documents]


def load_index(config: BlendConfig) -> Retriever:
    """The saved index.

    Raises:
        ConfigError: nothing was ingested yet, or the index is damaged.
    """
    from kvblend_rag.demo.retriever import Retriever

    folder = index_folder(config)
    if not folder.exists():
        raise ConfigError(f"Nothing was ingested into {config.store_path} yet: run `kvblend ingest DIR` first.")
    return Retriever.load(folder)


def saved_documents(config: BlendConfig) -> list[Document]:
    """What the index holds; nothing when it is missing or can't be read, for then it is made anew."""
    try:
        return list(load_index(config).documents)
    except ConfigError:
        return []


def save_index(config: BlendConfig, documents: Sequence[Document]) -> None:
    """Make the index anew and put it in the old one's place.

    Raises:
        StoreError: it can't be written.
    """
    from kvblend_rag.demo.retriever import Retriever

    folder = index_folder(config)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as new:
            Retriever(documents).save(Path(new) / "new")
            if folder.exists():
                folder.rename(Path(new) / "old")
            (Path(new) / "new").rename(folder)
    except (OSError, RuntimeError) as error:
        raise StoreError(f"The index in {folder} can't be written: {error}.") from error


def remove_documents(config: BlendConfig, ids: Sequence[str]) -> None:
    """Take documents out of the index; without any left, the index goes."""
    documents = saved_documents(config)
    gone = set(ids)
    kept = [document for document in documents if document.id not in gone]
    if documents and not kept:
        shutil.rmtree(index_folder(config), ignore_errors=True)
    elif len(kept) < len(documents):
        save_index(config, kept)


__all__ = ["index_folder", "load_index", "remove_documents", "save_index", "saved_documents", "with_folder"]
