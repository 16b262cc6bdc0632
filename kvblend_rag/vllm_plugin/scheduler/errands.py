"""Errands: chunks to be brought near for requests to come, when no prefill runs that it would slow down."""

from __future__ import annotations

import time
from collections.abc import Iterable

_IN_LINE = 64
"""Chunks that wait; more are let go, somebody will want them again."""

_PATIENCE_S = 2.0
"""An engine that has no step without a prefill for so long fetches beside one: five reads from a slow store."""


class Errands:
    """What was not loaded because it lies too far, until the workers are told to fetch it.

    Reading and checking a chunk takes the worker's own process some milliseconds. Beside the prefill of the request
    that did without them, they would make it slower than plain vLLM and help nobody sooner.
    """

    def __init__(self) -> None:
        self._keys: dict[str, None] = {}
        self._since = 0.0

    def add(self, keys: Iterable[str]) -> None:
        """Have chunks fetched, if there is room in the line; whether the request that met them lives on is the same."""
        if not self._keys:
            self._since = time.monotonic()
        for key in keys:
            if len(self._keys) < _IN_LINE:
                self._keys[key] = None

    def take(self, prefilling: bool) -> list[str]:
        """What is fetched from this step on: nothing beside a prefill, unless that has been so for long."""
        if not self._keys or (prefilling and time.monotonic() - self._since < _PATIENCE_S):
            return []
        keys, self._keys = list(self._keys), {}
        return keys


__all__ = ["Errands"]
