"""Nodes as the core knows documents: an id, and the text that will stand in the prompt."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore

from kvblend_rag.kvblend import KVBlend

if TYPE_CHECKING:
    from llama_index.llms.kvblend.base import KVBlendLLM

_MARK = "\u241f"  # the picture of the unit separator: in nobody's ids


def prompt_text(node: BaseNode | NodeWithScore) -> str:
    """A node's text as LlamaIndex's response synthesizers put it into a prompt."""
    inner = node.node if isinstance(node, NodeWithScore) else node
    return inner.get_content(metadata_mode=MetadataMode.LLM).strip()


def handle_of(kv: KVBlend | KVBlendLLM) -> KVBlend:
    """The handle, also of a model."""
    return kv if isinstance(kv, KVBlend) else kv.kv


class NodeIds:
    """The ids under which nodes hold their chunks: index, source document and node in one.

    So that a source document's nodes can be let go together (``delete``), one at a time (``delete_nodes``), and in
    another process than the one that added them. Nodes that have no source document are their own.

    Args:
        kv: its catalogue knows the documents of earlier processes.
        index: tells apart several indexes over one store.
    """

    def __init__(self, kv: KVBlend, index: str = "") -> None:
        self._kv, self._index = kv, index
        self._of_source: dict[str, set[str]] = defaultdict(set)

    def note(self, nodes: Iterable[BaseNode]) -> list[str]:
        """The nodes' ids, remembered."""
        ids = []
        for node in nodes:
            source = node.ref_doc_id or node.node_id
            ids.append(_MARK.join((self._index, source, node.node_id)))
            self._of_source[source].add(ids[-1])
        return ids

    def find(self, sources: Iterable[str] = (), nodes: Iterable[str] = ()) -> list[str]:
        """Ids of all nodes of the source documents, and of the nodes named."""
        sources, nodes = set(sources), set(nodes)
        return [each for each in self.all() if _parts(each)[1] in sources or _parts(each)[2] in nodes]

    def forget(self, ids: Sequence[str]) -> None:
        """Remember the ids no longer."""
        for each in ids:
            self._of_source[_parts(each)[1]].discard(each)

    def all(self) -> list[str]:
        """Every id of this index, of earlier processes too."""
        tenant = self._kv.config.tenant
        known = {
            each.document_id
            for each in self._kv.catalogue.documents()
            if each.tenant == tenant and _parts(each.document_id)[0] == self._index
        }
        return sorted(known.union(*self._of_source.values()))


def _parts(document_id: str) -> tuple[str | None, str, str]:
    parts = document_id.split(_MARK)
    return (parts[0], parts[1], parts[2]) if len(parts) == 3 else (None, "", "")


__all__ = ["NodeIds", "handle_of", "prompt_text"]
