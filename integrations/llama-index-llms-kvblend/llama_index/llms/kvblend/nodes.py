"""Nodes as the core knows documents: an id, and the text that will stand in the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore

from kvblend_rag.kvblend import KVBlend

if TYPE_CHECKING:
    from llama_index.llms.kvblend.base import KVBlendLLM


def prompt_text(node: BaseNode | NodeWithScore) -> str:
    """A node's text as LlamaIndex's response synthesizers put it into a prompt."""
    inner = node.node if isinstance(node, NodeWithScore) else node
    return inner.get_content(metadata_mode=MetadataMode.LLM).strip()


def handle_of(kv: KVBlend | KVBlendLLM) -> KVBlend:
    """The handle, also of a model."""
    return kv if isinstance(kv, KVBlend) else kv.kv


def source_of(node: BaseNode) -> str:
    """The id of the document a node was cut from; its own when there is none."""
    return node.ref_doc_id or node.node_id


__all__ = ["handle_of", "prompt_text", "source_of"]
