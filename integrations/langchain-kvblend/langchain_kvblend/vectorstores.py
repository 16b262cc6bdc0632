"""KVBlendVectorStore: any vector store, with the chunk store kept in step."""

from __future__ import annotations

import itertools
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.runnables.config import run_in_executor
from langchain_core.stores import BaseStore
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore

from kvblend_rag.documents import DocumentSync
from kvblend_rag.errors import ConfigError, KVBlendWarning
from kvblend_rag.ingest import IngestReport
from kvblend_rag.kvblend import KVBlend
from langchain_kvblend._documents import DocumentText, text_of, texts_of

_PAGE = 256


class KVBlendVectorStore(VectorStore):
    """A vector store that precomputes the KV of what is added, releases it when it is deleted, and prefetches what
    is found.

    Everything else, attributes of its own included, is the wrapped store's. Chunks are counted by document id: one
    that another document still holds stays.

    Args:
        store: the vector store to wrap.
        kv: engine and chunk store.
        document_prompt: how the chain writes a document into its prompt, when that is more than the page's content:
            the chain's ``document_prompt``, or a function from a document to text.
        background: compute in a thread of its own; ``flush`` waits for it and raises its errors.
        capacity: documents that may wait in the background; adding more blocks until there is room.
        prefetch: bring the chunks of what is found into the fastest tier.
        progress: show a progress bar.
        namespace: tells this store's document ids from those of others that share the chunk store.
    """

    def __init__(
        self,
        store: VectorStore,
        kv: KVBlend,
        *,
        document_prompt: DocumentText | None = None,
        background: bool = False,
        capacity: int = 1024,
        prefetch: bool = True,
        progress: bool = False,
        namespace: str = "",
    ) -> None:
        self.store = store
        self.kv = kv
        self.document_prompt = document_prompt
        self._prefetch = prefetch
        self._sync = DocumentSync(kv, namespace=namespace, background=background, capacity=capacity, progress=progress)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "store":
            raise AttributeError(name)
        return getattr(self.store, name)

    @property
    def embeddings(self) -> Embeddings | None:
        """The wrapped store's."""
        return self.store.embeddings

    # Adding and deleting

    def add_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        """Add or replace documents, and precompute their KV. Arguments as for the wrapped store."""
        ids = self.store.add_documents(documents, **kwargs)
        self._add(ids, documents)
        return ids

    async def aadd_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        """``add_documents`` for callers in an event loop."""
        ids = await self.store.aadd_documents(documents, **kwargs)
        await run_in_executor(None, self._add, ids, documents)
        return ids

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Add or replace texts, and precompute their KV. Arguments as for the wrapped store."""
        texts = list(texts)
        given = kwargs if ids is None else {**kwargs, "ids": ids}
        made = self.store.add_texts(texts, metadatas, **given)
        self._add(made, _as_documents(texts, metadatas))
        return made

    async def aadd_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """``add_texts`` for callers in an event loop."""
        texts = list(texts)
        given = kwargs if ids is None else {**kwargs, "ids": ids}
        made = await self.store.aadd_texts(texts, metadatas, **given)
        await run_in_executor(None, self._add, made, _as_documents(texts, metadatas))
        return made

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool | None:
        """Delete documents, and the chunks that nobody else holds. Arguments as for the wrapped store."""
        done = self.store.delete(ids, **kwargs)
        self._release(ids, done)
        return done

    async def adelete(self, ids: list[str] | None = None, **kwargs: Any) -> bool | None:
        """``delete`` for callers in an event loop."""
        done = await self.store.adelete(ids, **kwargs)
        await run_in_executor(None, self._release, ids, done)
        return done

    def adopt(
        self,
        documents: Iterable[Document] | None = None,
        *,
        ids: Iterable[str] | None = None,
        docstore: BaseStore[str, Document] | None = None,
        total: int | None = None,
        progress: bool = True,
    ) -> IngestReport:
        """Precompute what the wrapped store holds already; interrupted and called again, it goes on.

        Args:
            documents: the documents with their ids. Without any of these three the store is asked, which stores in
                memory, FAISS and Chroma can answer.
            ids: of the store's documents, such as a record manager's ``list_keys()``.
            docstore: holds the documents by id.
            total: how many, for the progress bar.
            progress: show a progress bar.

        Raises:
            ConfigError: the store can't say what it holds, or a document has no id.
        """
        if documents is None and ids is not None:
            documents = self._by_ids(ids)
        elif documents is None and docstore is not None:
            documents = _of_docstore(docstore)
        elif documents is None:
            documents, total = self._held()
        return self._sync.adopt(self._with_ids(documents), total=total, progress=progress)

    # Finding

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """The wrapped store's, with what is found prefetched; as all below."""
        return self._found(self.store.similarity_search(query, k=k, **kwargs))

    async def asimilarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """See :meth:`similarity_search`."""
        return await self._afound(await self.store.asimilarity_search(query, k=k, **kwargs))

    def similarity_search_with_score(self, *args: Any, **kwargs: Any) -> list[tuple[Document, float]]:
        """See :meth:`similarity_search`."""
        return self._scored(self.store.similarity_search_with_score(*args, **kwargs))

    async def asimilarity_search_with_score(self, *args: Any, **kwargs: Any) -> list[tuple[Document, float]]:
        """See :meth:`similarity_search`."""
        return await self._ascored(await self.store.asimilarity_search_with_score(*args, **kwargs))

    def similarity_search_with_relevance_scores(
        self, query: str, k: int = 4, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """See :meth:`similarity_search`."""
        return self._scored(self.store.similarity_search_with_relevance_scores(query, k=k, **kwargs))

    async def asimilarity_search_with_relevance_scores(
        self, query: str, k: int = 4, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """See :meth:`similarity_search`."""
        return await self._ascored(await self.store.asimilarity_search_with_relevance_scores(query, k=k, **kwargs))

    def similarity_search_by_vector(self, embedding: list[float], k: int = 4, **kwargs: Any) -> list[Document]:
        """See :meth:`similarity_search`."""
        return self._found(self.store.similarity_search_by_vector(embedding, k=k, **kwargs))

    async def asimilarity_search_by_vector(self, embedding: list[float], k: int = 4, **kwargs: Any) -> list[Document]:
        """See :meth:`similarity_search`."""
        return await self._afound(await self.store.asimilarity_search_by_vector(embedding, k=k, **kwargs))

    def max_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """See :meth:`similarity_search`."""
        found = self.store.max_marginal_relevance_search(query, k=k, fetch_k=fetch_k, lambda_mult=lambda_mult, **kwargs)
        return self._found(found)

    async def amax_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """See :meth:`similarity_search`."""
        found = await self.store.amax_marginal_relevance_search(
            query, k=k, fetch_k=fetch_k, lambda_mult=lambda_mult, **kwargs
        )
        return await self._afound(found)

    def max_marginal_relevance_search_by_vector(
        self, embedding: list[float], k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """See :meth:`similarity_search`."""
        found = self.store.max_marginal_relevance_search_by_vector(
            embedding, k=k, fetch_k=fetch_k, lambda_mult=lambda_mult, **kwargs
        )
        return self._found(found)

    async def amax_marginal_relevance_search_by_vector(
        self, embedding: list[float], k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """See :meth:`similarity_search`."""
        found = await self.store.amax_marginal_relevance_search_by_vector(
            embedding, k=k, fetch_k=fetch_k, lambda_mult=lambda_mult, **kwargs
        )
        return await self._afound(found)

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """The wrapped store's."""
        return self.store.get_by_ids(ids)

    async def aget_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """The wrapped store's."""
        return await self.store.aget_by_ids(ids)

    # Making one

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        kv: KVBlend | None = None,
        store_class: type[VectorStore] = InMemoryVectorStore,
        document_prompt: DocumentText | None = None,
        background: bool = False,
        capacity: int = 1024,
        prefetch: bool = True,
        progress: bool = False,
        namespace: str = "",
        **kwargs: Any,
    ) -> KVBlendVectorStore:
        """A new store of ``store_class`` with these texts, wrapped, and their KV precomputed.

        Args:
            texts: what is added.
            embedding: embeds them.
            metadatas: one a text.
            ids: one a text; made up when not given.
            kv: engine and chunk store; must be given.
            store_class: the vector store's class.
            document_prompt: as the six below, see the class.
            background: see the class.
            capacity: see the class.
            prefetch: see the class.
            progress: see the class.
            namespace: see the class.
            kwargs: for ``store_class.from_texts``.

        Raises:
            ConfigError: there is no ``kv``.
        """
        if kv is None:
            raise ConfigError(f"{cls.__name__}.from_texts and from_documents need kv=KVBlend(…).")
        ids = ids or [str(uuid.uuid4()) for _ in texts]
        made = cls(
            store_class.from_texts(texts, embedding, metadatas, ids=ids, **kwargs),
            kv,
            document_prompt=document_prompt,
            background=background,
            capacity=capacity,
            prefetch=prefetch,
            progress=progress,
            namespace=namespace,
        )
        made._add(ids, _as_documents(texts, metadatas))
        return made

    @classmethod
    async def afrom_texts(
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> KVBlendVectorStore:
        """``from_texts`` for callers in an event loop."""
        return await run_in_executor(None, cls.from_texts, texts, embedding, metadatas, ids=ids, **kwargs)

    # Work in the background

    @property
    def pending(self) -> int:
        """Documents whose KV still waits to be computed in the background."""
        return self._sync.pending

    def flush(self) -> IngestReport:
        """Wait for the background; returns what was done since the last time.

        Raises:
            KVBlendError: the first thing that went wrong since then.
        """
        return self._sync.flush()

    def close(self) -> None:
        """Flush and end the background; the wrapped store and the engine go on."""
        self._sync.close()

    def _add(self, ids: Sequence[str], documents: Sequence[Document]) -> None:
        self._sync.add(ids, texts_of(documents, self.document_prompt))

    def _release(self, ids: Sequence[str] | None, done: bool | None) -> None:
        if ids is None:
            warnings.warn(
                "Documents were deleted without naming their ids, so their chunks stay stored: delete by ids.",
                KVBlendWarning,
                stacklevel=3,
            )
        elif done is not False:
            self._sync.delete(ids)

    def _found(self, documents: list[Document]) -> list[Document]:
        if self._prefetch and documents:
            ids = [each.id or "" for each in documents]
            self._sync.prefetch(texts_of(documents, self.document_prompt), ids=ids)
        return documents

    async def _afound(self, documents: list[Document]) -> list[Document]:
        return await run_in_executor(None, self._found, documents)

    def _scored(self, found: list[tuple[Document, float]]) -> list[tuple[Document, float]]:
        self._found([document for document, _ in found])
        return found

    async def _ascored(self, found: list[tuple[Document, float]]) -> list[tuple[Document, float]]:
        return await run_in_executor(None, self._scored, found)

    def _with_ids(self, documents: Iterable[Document]) -> Iterator[tuple[str, str]]:
        for document in documents:
            if document.id is None:
                raise ConfigError("A document to adopt has no id: give it the one it has in the vector store.")
            yield document.id, text_of(document, self.document_prompt)

    def _by_ids(self, ids: Iterable[str]) -> Iterator[Document]:
        left = iter(ids)
        while page := list(itertools.islice(left, _PAGE)):
            yield from self.store.get_by_ids(page)

    def _held(self) -> tuple[Iterable[Document], int | None]:
        """The wrapped store's documents, where it can tell."""
        inside: Any = self.store
        if isinstance(inside, InMemoryVectorStore):
            return self._by_ids(list(inside.store)), len(inside.store)
        if isinstance(getattr(inside, "index_to_docstore_id", None), Mapping):  # FAISS
            ids = [str(each) for each in inside.index_to_docstore_id.values()]
            return self._by_ids(ids), len(ids)
        if callable(getattr(inside, "get", None)):  # Chroma
            ids = list(inside.get(include=[])["ids"])
            return self._by_ids(ids), len(ids)
        raise ConfigError(
            f"{type(self.store).__name__} can't say which documents it holds: pass adopt(documents), "
            "adopt(ids=record_manager.list_keys()) or adopt(docstore=…)."
        )


def _as_documents(texts: Sequence[str], metadatas: Sequence[dict[str, Any]] | None) -> list[Document]:
    given = metadatas or [{} for _ in texts]
    return [Document(page_content=text, metadata=metadata) for text, metadata in zip(texts, given, strict=True)]


def _of_docstore(docstore: BaseStore[str, Document]) -> Iterator[Document]:
    keys = iter(docstore.yield_keys())
    while page := list(itertools.islice(keys, _PAGE)):
        for key, document in zip(page, docstore.mget(page), strict=True):
            if document is not None:
                yield document.model_copy(update={"id": document.id or key})


__all__ = ["KVBlendVectorStore"]
