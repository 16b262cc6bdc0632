"""KVBlendTransform: precompute in an ingestion pipeline, for pipelines without a vector store."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import BaseNode, TransformComponent
from llama_index.llms.kvblend.base import KVBlendLLM
from llama_index.llms.kvblend.nodes import handle_of, prompt_text, source_of

from kvblend_rag.documents import DocumentSync
from kvblend_rag.kvblend import KVBlend


class KVBlendTransform(TransformComponent):
    """Precomputes the KV of the nodes that pass through it; put it last.

    A convenience: a transformation never hears of deletions, is left out when the pipeline's cache holds its input,
    and can't run in other processes (``num_workers``). Wrap the vector store in ``KVBlendVectorStore`` where you can.

    Args:
        kv: engine and store, or a model that has them.
        index: as for ``KVBlendVectorStore``: with the same name, that one's deletions let go of these nodes.
        progress: show a progress bar.
    """

    _sync: DocumentSync = PrivateAttr()

    def __init__(self, kv: KVBlend | KVBlendLLM, *, index: str = "", progress: bool = False) -> None:
        super().__init__()
        self._sync = DocumentSync(handle_of(kv), namespace=index, progress=progress)

    @classmethod
    def class_name(cls) -> str:
        """See ``BaseComponent``."""
        return "KVBlendTransform"

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Precompute the nodes' KV, and pass them on."""
        self._sync.add(
            [node.node_id for node in nodes],
            [prompt_text(node) for node in nodes],
            groups=[source_of(node) for node in nodes],
        )
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """See ``__call__``."""
        return await asyncio.to_thread(self, nodes, **kwargs)


__all__ = ["KVBlendTransform"]
