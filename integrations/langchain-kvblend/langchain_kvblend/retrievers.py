"""KVBlendRetriever: any retriever, with what it finds prefetched."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables.config import run_in_executor
from pydantic import ConfigDict, PrivateAttr

from kvblend_rag.documents import DocumentSync
from kvblend_rag.kvblend import KVBlend
from langchain_kvblend._documents import DocumentText, texts_of


class KVBlendRetriever(BaseRetriever):
    """A retriever whose hits are brought into the fastest tier before the prompt that holds them arrives.

    What is retrieved must have been ingested: by a :class:`KVBlendVectorStore`, or by ``KVBlend.ingest``. The
    retriever of a ``KVBlendVectorStore`` prefetches by itself and needs no wrapper.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    retriever: BaseRetriever
    """The retriever to wrap; keyword arguments of ``invoke`` are passed on to it."""

    kv: KVBlend
    """Engine and chunk store."""

    document_prompt: Any = None
    """How the chain writes a document into its prompt: its ``document_prompt``, or a function; None: the page's
    content alone."""

    _sync: DocumentSync = PrivateAttr()

    def __init__(
        self, retriever: BaseRetriever, kv: KVBlend, *, document_prompt: DocumentText | None = None, **kwargs: Any
    ) -> None:
        super().__init__(retriever=retriever, kv=kv, document_prompt=document_prompt, **kwargs)  # type: ignore[call-arg]
        self._sync = DocumentSync(kv)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        documents = self.retriever.invoke(query, {"callbacks": run_manager.get_child()}, **kwargs)
        self._sync.prefetch(texts_of(documents, self.document_prompt))
        return documents

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        documents = await self.retriever.ainvoke(query, {"callbacks": run_manager.get_child()}, **kwargs)
        await run_in_executor(None, self._sync.prefetch, texts_of(documents, self.document_prompt))
        return documents


__all__ = ["KVBlendRetriever"]
