"""LlamaIndex on kvblend-rag: retrieved chunks' precomputed KV, blended inside vLLM.

>>> from llama_index.core import Settings, StorageContext, VectorStoreIndex
>>> Settings.llm = KVBlendLLM(kv=kv)
>>> vectors = KVBlendVectorStore(FaissMapVectorStore(faiss_index), kv)
>>> storage = StorageContext.from_defaults(vector_store=vectors)
>>> index = VectorStoreIndex.from_documents(documents, storage_context=storage)
>>> index.as_query_engine().query("…")

Names are imported on first use, so that importing the package loads neither LlamaIndex, torch nor vLLM.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_index.llms.kvblend.base import KVBlendLLM
    from llama_index.llms.kvblend.found import found_nodes, watch_answers
    from llama_index.llms.kvblend.postprocessor import KVBlendPrefetch
    from llama_index.llms.kvblend.transform import KVBlendTransform
    from llama_index.llms.kvblend.vector_store import KVBlendVectorStore

__version__ = "0.1.0"

_HOMES = {
    "KVBlendLLM": "base",
    "KVBlendPrefetch": "postprocessor",
    "KVBlendTransform": "transform",
    "KVBlendVectorStore": "vector_store",
    "found_nodes": "found",
    "watch_answers": "found",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


__all__ = [
    "KVBlendLLM",
    "KVBlendPrefetch",
    "KVBlendTransform",
    "KVBlendVectorStore",
    "found_nodes",
    "watch_answers",
]
