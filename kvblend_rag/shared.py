"""One KVBlend, and so one engine, for all framework models of one configuration."""

from __future__ import annotations

import json
import threading

from kvblend_rag.config import BlendConfig
from kvblend_rag.kvblend import KVBlend

_lock = threading.Lock()
_handles: dict[str, KVBlend] = {}
_users: dict[str, int] = {}


def shared_handle(config: BlendConfig, api_key: str = "") -> KVBlend:
    """The handle of this configuration, made when nobody has it; each call is one user of it.

    No engine is started by this. Configurations are the same when all their effective settings are. A handle
    nobody releases stays until the process ends, so that a second model of the configuration starts at once.
    """
    key = _key(config, api_key)
    with _lock:
        handle = _handles.get(key)
        if handle is None or handle.closed:
            handle = _handles[key] = KVBlend(config, api_key=api_key)
            _users[key] = 0
        _users[key] += 1
        return handle


def release_handle(kv: KVBlend) -> bool:
    """One user less; the last one's release closes engine and store.

    Returns:
        Whether it was closed now. A handle that came from elsewhere is left alone.
    """
    with _lock:
        key = next((key for key, handle in _handles.items() if handle is kv), None)
        if key is None:
            return False
        _users[key] -= 1
        if _users[key] > 0:
            return False
        del _handles[key], _users[key]
    kv.close()
    return True


def _key(config: BlendConfig, api_key: str) -> str:
    return json.dumps([config.to_dict(), api_key], sort_keys=True, default=repr)


__all__ = ["release_handle", "shared_handle"]
