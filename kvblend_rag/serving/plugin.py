"""KVBlendEndpoints: the routes as a plug-in of vLLM's server (entry point group ``vllm.endpoint_plugins``).

vLLM loads it where ``VLLM_PLUGINS`` names ``kvblend``; ``kvblend serve`` sees to that.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from typing import Any

from fastapi import FastAPI

from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import KVBlendError
from kvblend_rag.kvblend import KVBlend
from kvblend_rag.serving.routes import router
from kvblend_rag.serving.service import Service

logger = logging.getLogger(__name__)

NAME = "kvblend"


class KVBlendEndpoints:
    """See ``vllm.plugins.endpoint_plugins.interface.EndpointPlugin``."""

    name = NAME
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Make what the routes work with; a server without the connector answers them with the reason."""
        try:
            state.kvblend = await _service(engine_client, args)
        except KVBlendError as error:
            state.kvblend = str(error).rstrip(".")


async def _service(engine_client: Any, args: Namespace) -> Service:
    from kvblend_rag.vllm_plugin.engine import VLLMEngine

    engine = await VLLMEngine.inside(engine_client)
    transfer = engine_client.vllm_config.kv_transfer_config
    config = BlendConfig.load(**transfer.kv_connector_extra_config)
    if config.max_risk < 1:
        logger.warning(
            "kvblend: max_risk is %g, and no risk is judged: OpenAI's routes hold nothing back.", config.max_risk
        )
    names = getattr(args, "served_model_name", None) or [engine.info.model]
    kv = KVBlend(config.replace(model=engine.info.model), engine)
    service = Service(kv, names if isinstance(names, str) else names[0])
    if service.learner is not None:
        service.learner.start()
    return service


__all__ = ["NAME", "KVBlendEndpoints"]
