"""One KVBlend, and so one engine, for all framework models of one configuration."""

from __future__ import annotations

from kvblend_rag.config import BlendConfig
from kvblend_rag.kvblend import KVBlend


def shared_handle(config: BlendConfig) -> KVBlend:
    """The handle of this configuration, made when nobody has it; each call is one user of it.

    No engine is started by this. Configurations are the same when all their effective settings are.
    """
    raise NotImplementedError


def release_handle(kv: KVBlend) -> bool:
    """One user less; the last one's release closes engine and store.

    Returns:
        Whether it was closed now. A handle that came from elsewhere is left alone.
    """
    raise NotImplementedError


__all__ = ["release_handle", "shared_handle"]
