"""Retriever: which documents a question needs, by static word embeddings and FAISS, all offline."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvblend_rag.demo.library import Document
from kvblend_rag.errors import ConfigError

_INDEX = "index.faiss"
_DOCUMENTS = "documents.json"


class Retriever:
    """Documents, found by the cosine of their embedding and the question's (256 dimensions)."""

    def __init__(self, documents: Sequence[Document]) -> None:
        """Embed all documents; a thousand take about half a second."""
        if not documents:
            raise ConfigError("The retriever got no documents.")
        self.documents = list(documents)
        vectors = _embed([document.content for document in self.documents])
        self._index = _faiss().IndexFlatIP(vectors.shape[1])
        self._index.add(vectors)

    def search(self, question: str, k: int = 5) -> list[Document]:
        """The ``k`` nearest documents, the best one first; all of them when there are fewer."""
        if k < 1:
            raise ConfigError(f"k is {k}, and must be 1 or more.")
        _, found = self._index.search(_embed([question]), min(k, len(self.documents)))
        return [self.documents[i] for i in found[0]]

    def save(self, folder: str | Path) -> None:
        """Write the index and its documents into a folder, which is created when missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _faiss().write_index(self._index, str(folder / _INDEX))
        entries = [asdict(document) for document in self.documents]
        (folder / _DOCUMENTS).write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Retriever:
        """The retriever that was saved into a folder.

        Raises:
            ConfigError: the folder holds no saved retriever, or a damaged one.
        """
        folder = Path(folder)
        faiss = _faiss()
        try:
            entries = json.loads((folder / _DOCUMENTS).read_text(encoding="utf-8"))
            documents = [Document(**entry) for entry in entries]
            index = faiss.read_index(str(folder / _INDEX))
        except FileNotFoundError as error:
            raise ConfigError(f"There is no saved retriever in {folder}.") from error
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(f"The retriever saved in {folder} can't be read: save it again.") from error
        if index.ntotal != len(documents):
            raise ConfigError(f"The retriever saved in {folder} is incomplete: save it again.")
        retriever = cls.__new__(cls)
        retriever.documents, retriever._index = documents, index
        return retriever


def _embed(texts: list[str]) -> Any:
    return _embeddings().embed(texts, norm=True)


@functools.cache
def _embeddings() -> Any:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        import wordllama
    except ImportError as error:
        raise ConfigError("Retrieval needs wordllama: pip install 'kvblend-rag[demo]'.") from error
    finally:
        # wordllama turns on INFO messages for the whole process when it is imported.
        root.handlers[:] = handlers
        root.setLevel(level)
    # The embeddings are inside the wheel; without this folder wordllama looks for them on a hub.
    inside_the_wheel = Path(wordllama.__file__).parent
    return wordllama.WordLlama.load(cache_dir=inside_the_wheel, disable_download=True)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ConfigError("Retrieval needs faiss-cpu: pip install 'kvblend-rag[demo]'.") from error
    return faiss


__all__ = ["Retriever"]
