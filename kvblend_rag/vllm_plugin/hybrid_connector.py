"""HybridConnector: the connector of models with state-space layers, which are never blended.

vLLM starts such a model only with a connector that takes several kinds of KV cache (``SupportsHMA``). For all others
that is unwanted: layers with and without a window are to share one cache, all of whose tokens stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvblend_rag.vllm_plugin.connector import KVBlendConnector

# isort: split
from vllm.distributed.kv_transfer.kv_connector.v1.base import SupportsHMA

if TYPE_CHECKING:
    from vllm.v1.request import Request


class HybridConnector(KVBlendConnector, SupportsHMA):
    """Refuses the model and says why; its requests are ordinary ones."""

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The same as for one kind of cache."""
        return self.request_finished(request, block_ids[0])


__all__ = ["HybridConnector"]
