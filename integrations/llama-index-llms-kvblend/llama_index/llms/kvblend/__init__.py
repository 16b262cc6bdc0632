"""LlamaIndex on kvblend-rag: retrieved chunks' precomputed KV, blended inside vLLM.

>>> from llama_index.core import Settings, StorageContext, VectorStoreIndex
>>> Settings.llm = KVBlendLLM(kv=kv)
>>> vectors = KVBlendVectorStore(FaissMapVectorStore(faiss_index), kv)
>>> storage = StorageContext.from_defaults(vector_store=vectors)
>>> index = VectorStoreIndex.from_documents(documents, storage_context=storage)
>>> index.as_query_engine().query("…")
"""

from __future__ import annotations

from llama_index.llms.kvblend.base import KVBlendLLM
from llama_index.llms.kvblend.found import found_nodes, watch_answers
from llama_index.llms.kvblend.postprocessor import KVBlendPrefetch
from llama_index.llms.kvblend.transform import KVBlendTransform
from llama_index.llms.kvblend.vector_store import KVBlendVectorStore

__version__ = "0.1.0"

__all__ = [
    "KVBlendLLM",
    "KVBlendPrefetch",
    "KVBlendTransform",
    "KVBlendVectorStore",
    "found_nodes",
    "watch_answers",
]
