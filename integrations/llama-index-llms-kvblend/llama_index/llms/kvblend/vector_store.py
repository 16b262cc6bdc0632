"""KVBlendVectorStore: any vector store, with the chunk store kept in step."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import fsspec  # type: ignore[import-untyped]
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import BaseNode, Document
from llama_index.core.storage.docstore.types import BaseDocumentStore
from llama_index.core.vector_stores.types import (
    DEFAULT_PERSIST_DIR,
    DEFAULT_PERSIST_FNAME,
    BasePydanticVectorStore,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryResult,
)
from llama_index.llms.kvblend.base import KVBlendLLM
from llama_index.llms.kvblend.nodes import handle_of, prompt_text, source_of

from kvblend_rag.documents import DocumentSync
from kvblend_rag.errors import ConfigError, KVBlendError
from kvblend_rag.ingest import IngestReport
from kvblend_rag.kvblend import KVBlend


class KVBlendVectorStore(BasePydanticVectorStore):
    """Wraps a vector store: adding nodes precomputes their KV, deleting lets it go, querying prefetches it.

    Chunks are content-addressed and stay as long as any node holds them. LlamaIndex replaces an edited document by
    deleting it and adding it anew; so that its unchanged chunks are not computed again, what is deleted is let go
    after the next ``add``, or at the next ``query``, ``flush`` or ``close``, whichever comes first.

    Args:
        store: what is wrapped; it sees every call first.
        kv: engine and store, or a model that has them.
        docstore: where nodes are, for ``adopt`` of a store that can't list its own.
        background: precompute in a thread of its own; ``flush`` waits for it and raises its errors.
        index: name of this index, where several indexes with the same documents share one chunk store.
        progress: show a progress bar.
        capacity: nodes that may wait in background mode; adding more blocks.
    """

    stores_text: bool
    is_embedding_query: bool

    _store: BasePydanticVectorStore = PrivateAttr()
    _sync: DocumentSync = PrivateAttr()
    _docstore: BaseDocumentStore | None = PrivateAttr()

    def __init__(
        self,
        store: BasePydanticVectorStore,
        kv: KVBlend | KVBlendLLM,
        *,
        docstore: BaseDocumentStore | None = None,
        background: bool = False,
        index: str = "",
        progress: bool = False,
        capacity: int = 1024,
    ) -> None:
        super().__init__(stores_text=store.stores_text, is_embedding_query=store.is_embedding_query)
        self._store, self._docstore = store, docstore
        self._sync = DocumentSync(
            handle_of(kv), namespace=index, background=background, progress=progress, capacity=capacity
        )
        _open_stores.add(self)

    @classmethod
    def class_name(cls) -> str:
        """See ``BaseComponent``."""
        return "KVBlendVectorStore"

    @property
    def client(self) -> Any:
        """The wrapped store's client."""
        return self._store.client

    @property
    def inner(self) -> BasePydanticVectorStore:
        """The wrapped store."""
        return self._store

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    # Adding

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Add nodes and precompute their KV.

        Raises:
            StoreError: the nodes are in the vector store and their KV can't be stored.
        """
        added = self._store.add(nodes, **kwargs)
        self._precompute(nodes)
        return added

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """See ``add``."""
        added = await self._store.async_add(nodes, **kwargs)
        await asyncio.to_thread(self._precompute, nodes)
        return added

    def _precompute(self, nodes: Sequence[BaseNode]) -> None:
        self._sync.add(
            [node.node_id for node in nodes],
            [prompt_text(node) for node in nodes],
            groups=[source_of(node) for node in nodes],
        )

    def adopt(
        self, source: BaseDocumentStore | Iterable[BaseNode] | Any = None, *, progress: bool = True
    ) -> IngestReport:
        """Precompute the nodes that an index holds already; interrupted, it goes on where it stopped.

        Args:
            source: a docstore, an index, or nodes; None: the wrapped store's own (``get_nodes``), else the docstore
                this was made with.
            progress: show a progress bar.

        Raises:
            ConfigError: there are no nodes to be found there.
        """
        nodes = self._nodes_of(source)
        sources = {node.node_id: source_of(node) for node in nodes}
        pairs = ((node.node_id, prompt_text(node)) for node in nodes)
        return self._sync.adopt(pairs, group_of=sources.__getitem__, total=len(nodes), progress=progress)

    def _nodes_of(self, source: Any) -> list[BaseNode]:
        if source is None:
            with contextlib.suppress(NotImplementedError):
                return list(self._store.get_nodes())
            source = self._docstore
        if source is None:
            raise ConfigError(
                f"{type(self._store).__name__} can't list its nodes: give adopt() the index, its docstore or the nodes."
            )
        docstore = getattr(source, "docstore", source)
        found = list(docstore.docs.values() if isinstance(docstore, BaseDocumentStore) else docstore)
        nodes = [node for node in found if not isinstance(node, Document)]
        if found and not nodes:
            raise ConfigError(
                "This docstore holds whole documents (an IngestionPipeline's does), and prompts hold nodes: give "
                "adopt() the nodes, such as the pipeline's output or a vector store that lists its own."
            )
        return nodes

    # Deleting

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Delete a source document's nodes."""
        self._store.delete(ref_doc_id, **delete_kwargs)
        self._sync.delete(groups=[ref_doc_id], later=True)

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """See ``delete``."""
        await self._store.adelete(ref_doc_id, **delete_kwargs)
        await asyncio.to_thread(self._sync.delete, groups=[ref_doc_id], later=True)

    def delete_nodes(
        self,
        node_ids: list[str] | None = None,
        filters: MetadataFilters | None = None,
        **delete_kwargs: Any,
    ) -> None:
        """Delete nodes."""
        gone = node_ids or []
        if filters is not None:  # which ones these are, only the wrapped store knows
            gone = [node.node_id for node in self._store.get_nodes(node_ids, filters)]
        self._store.delete_nodes(node_ids, filters, **delete_kwargs)
        self._sync.delete(gone, later=True)

    async def adelete_nodes(
        self,
        node_ids: list[str] | None = None,
        filters: MetadataFilters | None = None,
        **delete_kwargs: Any,
    ) -> None:
        """See ``delete_nodes``."""
        gone = node_ids or []
        if filters is not None:
            gone = [node.node_id for node in await self._store.aget_nodes(node_ids, filters)]
        await self._store.adelete_nodes(node_ids, filters, **delete_kwargs)
        await asyncio.to_thread(self._sync.delete, gone, later=True)

    def clear(self) -> None:
        """Delete everything."""
        self._store.clear()
        self._sync.clear()

    async def aclear(self) -> None:
        """See ``clear``."""
        await self._store.aclear()
        await asyncio.to_thread(self._sync.clear)

    # Querying

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """Query the wrapped store, and bring the KV of what it finds into the fastest tier."""
        result = self._store.query(query, **kwargs)
        self._prefetch(result)
        return result

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """See ``query``."""
        result = await self._store.aquery(query, **kwargs)
        await asyncio.to_thread(self._prefetch, result)
        return result

    def _prefetch(self, result: VectorStoreQueryResult) -> None:
        nodes = result.nodes or ()
        ids = [node.node_id for node in nodes] if nodes else result.ids or ()  # Faiss returns ids only
        self._sync.prefetch([prompt_text(node) for node in nodes], ids=ids)

    def get_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None) -> list[BaseNode]:
        """The wrapped store's nodes."""
        return self._store.get_nodes(node_ids, filters)

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """See ``get_nodes``."""
        return await self._store.aget_nodes(node_ids, filters)

    # Ending

    def persist(
        self,
        persist_path: str = f"{DEFAULT_PERSIST_DIR}/{DEFAULT_PERSIST_FNAME}",
        fs: fsspec.AbstractFileSystem | None = None,
    ) -> None:
        """Persist the wrapped store; the chunk store is on disk already."""
        self._store.persist(persist_path, fs=fs)

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """The wrapped store's; the chunk store has files of its own."""
        return self._store.to_dict(**kwargs)

    @property
    def pending(self) -> int:
        """Nodes that still wait in background mode."""
        return self._sync.pending

    def flush(self) -> IngestReport:
        """Wait until nothing is pending; returns what was done since the last flush.

        Raises:
            KVBlendError: the first thing that went wrong in the background.
        """
        return self._sync.flush()

    def close(self) -> None:
        """Flush, and end the background thread; a second call does nothing. The wrapped store stays open."""
        self._sync.close()
        _open_stores.discard(self)


_open_stores: weakref.WeakSet[KVBlendVectorStore] = weakref.WeakSet()


@atexit.register  # later than kvblend_rag's own, so it runs before engines are closed
def _let_all_go() -> None:
    for store in list(_open_stores):
        with contextlib.suppress(KVBlendError):
            store.close()


__all__ = ["KVBlendVectorStore"]
