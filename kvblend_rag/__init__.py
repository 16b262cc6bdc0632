"""kvblend-rag: precomputed KV of document chunks, blended inside vLLM.

Names are imported on first use, so that ``import kvblend_rag`` loads neither torch nor vLLM.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvblend_rag.chat import Chat
    from kvblend_rag.config import BlendConfig
    from kvblend_rag.conversation.sampling import Sampling
    from kvblend_rag.documents import DocumentSync, which_found
    from kvblend_rag.ingest import IngestReport
    from kvblend_rag.kvblend import KVBlend
    from kvblend_rag.llm import LLM
    from kvblend_rag.offline import OfflineKVPreCompute, close_engine, combine_input_prompt_chunks
    from kvblend_rag.output import CompletionOutput, RequestMetrics, RequestOutput
    from kvblend_rag.report import BlendReport
    from kvblend_rag.vllm_plugin.engine import SamplingParams, connector_arguments

__version__ = "0.1.0"

_HOMES = {
    "Chat": "chat",
    "DocumentSync": "documents",
    "Sampling": "conversation.sampling",
    "which_found": "documents",
    "BlendConfig": "config",
    "BlendReport": "report",
    "CompletionOutput": "output",
    "IngestReport": "ingest",
    "KVBlend": "kvblend",
    "LLM": "llm",
    "OfflineKVPreCompute": "offline",
    "RequestMetrics": "output",
    "RequestOutput": "output",
    "SamplingParams": "vllm_plugin.engine",
    "close_engine": "offline",
    "combine_input_prompt_chunks": "offline",
    "connector_arguments": "vllm_plugin.engine",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        from kvblend_rag.errors import VLLM_MISSING, EngineUnavailable

        raise EngineUnavailable(VLLM_MISSING) from None


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


__all__ = [
    "LLM",
    "BlendConfig",
    "BlendReport",
    "Chat",
    "CompletionOutput",
    "DocumentSync",
    "IngestReport",
    "KVBlend",
    "OfflineKVPreCompute",
    "RequestMetrics",
    "RequestOutput",
    "Sampling",
    "SamplingParams",
    "close_engine",
    "combine_input_prompt_chunks",
    "connector_arguments",
    "which_found",
]
