"""KVBlendPrefetch: a node postprocessor that brings retrieved nodes' KV near before the prompt arrives."""

from __future__ import annotations

from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.llms.kvblend.base import KVBlendLLM
from llama_index.llms.kvblend.nodes import handle_of, prompt_text

from kvblend_rag.documents import DocumentSync
from kvblend_rag.kvblend import KVBlend


class KVBlendPrefetch(BaseNodePostprocessor):
    """Prefetches the KV of the nodes it is given, and passes them on; put it last, behind the reranker.

    Args:
        kv: engine and store, or a model that has them.
        background: do not wait for the prefetch.
    """

    _sync: DocumentSync = PrivateAttr()

    def __init__(self, kv: KVBlend | KVBlendLLM, *, background: bool = False) -> None:
        super().__init__()
        self._sync = DocumentSync(handle_of(kv), background=background)

    @classmethod
    def class_name(cls) -> str:
        """See ``BaseComponent``."""
        return "KVBlendPrefetch"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        self._sync.prefetch([prompt_text(node) for node in nodes])
        return nodes


__all__ = ["KVBlendPrefetch"]
