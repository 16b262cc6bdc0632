"""LangChain on kvblend-rag: chunks' KV is computed once and blended into every prompt that holds them.

Names are imported on first use, so that ``import langchain_kvblend`` loads neither LangChain, torch nor vLLM.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from langchain_kvblend.callbacks import PrefetchHandler
    from langchain_kvblend.chat_models import ChatKVBlend
    from langchain_kvblend.llms import KVBlendLLM
    from langchain_kvblend.retrievers import KVBlendRetriever
    from langchain_kvblend.vectorstores import KVBlendVectorStore

__version__ = "0.1.0"

_HOMES = {
    "ChatKVBlend": "chat_models",
    "KVBlendLLM": "llms",
    "KVBlendRetriever": "retrievers",
    "KVBlendVectorStore": "vectorstores",
    "PrefetchHandler": "callbacks",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


__all__ = ["ChatKVBlend", "KVBlendLLM", "KVBlendRetriever", "KVBlendVectorStore", "PrefetchHandler"]
