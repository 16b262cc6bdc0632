"""Connection: OpenAI's client to one server, and its errors as ours, in one sentence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvblend_rag.errors import ConfigError, EngineUnavailable, KVBlendError, PromptTooLong, RequestTimeout

API_KEY_VARIABLE = "KVBLEND_API_KEY"
CLIENT_MISSING = "The client library is not installed: pip install 'kvblend-rag[client]'."

_PATIENCE_S = 600.0


class NotServed(ConfigError):
    """The server has no such route, or nothing under that name."""


class Connection:
    """Asks one server, from a thread or from an event loop.

    Args:
        base_url: as OpenAI's clients take it, such as ``http://host:8000/v1``.
        api_key: the server's; empty: ``KVBLEND_API_KEY``, or ``OPENAI_API_KEY``.

    Raises:
        EngineUnavailable: the client library is missing.
    """

    def __init__(self, base_url: str, api_key: str = "") -> None:
        try:
            from openai import AsyncOpenAI, OpenAI
        except ImportError as error:
            raise EngineUnavailable(CLIENT_MISSING) from error
        self.url = base_url.rstrip("/")
        self.root = self.url.removesuffix("/v1")
        key = api_key or os.environ.get(API_KEY_VARIABLE) or os.environ.get("OPENAI_API_KEY") or "none"
        given: dict[str, Any] = {"base_url": f"{self.root}/v1", "api_key": key, "timeout": _PATIENCE_S}
        self.sync = OpenAI(**given)
        self.client = AsyncOpenAI(**given)

    def get(self, path: str) -> Any:
        """What a route of ours answers; ``path`` is below ``/v1/kvblend``."""
        with self.explained():
            return self.sync.get(f"/kvblend{path}", cast_to=object)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """``get`` with a body; a path with a scheme is taken as it is."""
        with self.explained():
            return self.sync.post(self._path(path), body=body, cast_to=object)

    async def aget(self, path: str) -> Any:
        """``get`` for callers in an event loop."""
        with self.explained():
            return await self.client.get(f"/kvblend{path}", cast_to=object)

    async def apost(self, path: str, body: dict[str, Any]) -> Any:
        """``post`` for callers in an event loop."""
        with self.explained():
            return await self.client.post(self._path(path), body=body, cast_to=object)

    def close(self) -> None:
        """Let go of what is open for callers without a loop."""
        self.sync.close()

    def _path(self, path: str) -> str:
        return path if "://" in path else f"/kvblend{path}"

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Raise what goes wrong as one of our errors."""
        import openai

        try:
            yield
        except openai.APITimeoutError as error:
            raise RequestTimeout(f"{self.url} did not answer in time.") from error
        except openai.APIConnectionError as error:
            raise EngineUnavailable(f"{self.url} can't be reached: is a server running there?") from error
        except openai.APIStatusError as error:
            raise self._as_ours(error.status_code, _message(error)) from error
        except openai.APIError as error:  # in the middle of a stream
            raise EngineUnavailable(f"{self.url} broke off: {_line(error.message)}") from error

    def _as_ours(self, status: int, message: str) -> KVBlendError:
        if status in (401, 403):
            return ConfigError(f"{self.url} does not accept this API key: give api_key, or set {API_KEY_VARIABLE}.")
        if status == 404:
            return NotServed(f"{self.url} does not know what was asked for: {message}")
        if PromptTooLong.is_meant_by(message):
            return PromptTooLong(f"The prompt does not fit into the model's context: {message}")
        if status < 500:
            return ConfigError(f"{self.url} does not accept the request: {message}")
        return EngineUnavailable(f"{self.url} failed with status {status}: {message}")


def _message(error: Any) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    inner = body.get("error", body)
    return _line(str(inner.get("message") if isinstance(inner, dict) else "") or error.message)


def _line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason was given."])[0]


__all__ = ["API_KEY_VARIABLE", "CLIENT_MISSING", "Connection", "NotServed"]
