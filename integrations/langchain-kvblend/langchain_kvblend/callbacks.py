"""PrefetchHandler: prefetches what any retriever finds, without a change to the chain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document

from kvblend_rag.documents import DocumentSync
from kvblend_rag.kvblend import KVBlend
from langchain_kvblend._documents import DocumentText, texts_of


class PrefetchHandler(BaseCallbackHandler):
    """Brings the chunks of retrieved documents into the fastest tier: ``config={"callbacks": [PrefetchHandler(kv)]}``.

    Args:
        kv: engine and chunk store.
        document_prompt: how the chain writes a document into its prompt: its ``document_prompt``, or a function;
            None: the page's content alone.
    """

    def __init__(self, kv: KVBlend, *, document_prompt: DocumentText | None = None) -> None:
        self.document_prompt = document_prompt
        self._sync = DocumentSync(kv)

    def on_retriever_end(
        self, documents: Sequence[Document], *, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        """Called by LangChain when a retriever is done."""
        if documents:
            self._sync.prefetch(texts_of(documents, self.document_prompt))


__all__ = ["PrefetchHandler"]
