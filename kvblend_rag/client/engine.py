"""HTTPEngine: a running server behind the Engine protocol."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar, cast

import numpy as np

from kvblend_rag.client.connection import Connection, NotServed
from kvblend_rag.client.documents import ServedDocuments
from kvblend_rag.client.reading import Reading
from kvblend_rag.client.tokenizer import ServedTokenizer
from kvblend_rag.client.turn import ServedParams, ServedTurn, request_body
from kvblend_rag.conversation.sampling import Sampling
from kvblend_rag.conversation.template import ESCAPED
from kvblend_rag.conversation.turn import ChatRequest, Turn
from kvblend_rag.engine import Engine, EngineInfo, Prompt, Watched
from kvblend_rag.errors import ConfigError, KVBlendError
from kvblend_rag.loop import LoopThread
from kvblend_rag.output import RequestOutput

T = TypeVar("T")


class HTTPEngine(Engine):
    """A server that was started by ``kvblend serve``.

    Args:
        base_url: as OpenAI's clients take it, such as ``http://host:8000/v1``.
        api_key: the server's.
        model: the name it must serve the model as; empty: whatever it serves.

    Raises:
        EngineUnavailable: nothing answers there, or the client library is missing.
        ConfigError: it has no routes of ours, wants another key, or serves another model.
    """

    def __init__(self, base_url: str, api_key: str = "", model: str = "") -> None:
        self._connection = Connection(base_url, api_key)
        try:
            told = self._connection.get("/info")
        except NotServed as error:
            raise ConfigError(
                f"{base_url} is a server without kvblend's routes: start it with `kvblend serve`, or set "
                "VLLM_PLUGINS=kvblend for `vllm serve`."
            ) from error
        if model not in ("", told["served_as"], told["model"]):
            raise ConfigError(f"{base_url} serves {told['served_as']}, not {model}.")
        self.settings: dict[str, Any] = told["settings"]
        """The server's defaults of blending, and its chunk size."""
        self._model = str(told["served_as"])
        self.info = EngineInfo(
            model=self._model,
            max_model_len=int(told["max_model_len"]),
            dtype=told["dtype"],
            device=told["device"],
            version=told["version"],
            fingerprint=told["fingerprint"],
            context=tuple(told["context"]),
            header=None if told["header"] is None else tuple(told["header"]),
            refusal=told["refusal"],
            architectures=tuple(told["architectures"]),
        )
        self._tokenizer = ServedTokenizer(self._connection, self._model, told["chat_template"])
        self.documents = ServedDocuments(self._connection)
        self._loop = LoopThread()
        self._closed = False

    @property
    def tokenizer(self) -> ServedTokenizer:
        """The server's tokenizer; each text is a question to it."""
        return self._tokenizer

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), **template: Any
    ) -> list[int]:
        """See :meth:`Engine.render`."""
        return self._tokenizer.conversation(messages, tools, **template)

    def sampling(self, settings: Sampling, *, stream: bool = False) -> ServedParams:
        """See :meth:`Engine.sampling`."""
        return ServedParams(request_body(settings, self._model, chat=False), stream)

    def turn(self, request: ChatRequest, *, stream: bool = False) -> Turn:
        """See :meth:`Engine.turn`; the server chose its parsers when it was started."""
        if request.tool_parser or request.reasoning_parser:
            raise ConfigError("A server has its parsers chosen at start: leave tool_parser and reasoning_parser out.")
        results = any(message.get("role") == "tool" for message in request.messages)
        warnings = (ESCAPED,) if results and self._escapes else ()
        return ServedTurn(request, self._model, stream, warnings)

    def one_token(self) -> ServedParams:
        """See :meth:`Engine.one_token`."""
        return self.sampling(Sampling(max_tokens=1, temperature=0.0))

    def watched(self, sampling_params: Any, *, whole: bool = False, most: int | None = None) -> Watched:
        """See :meth:`Engine.watched`; what a server has sent can't be held back from here."""
        raise ConfigError("max_risk is judged beside the engine, and this one is a server: leave max_risk at 1.")

    def generate(
        self,
        prompt: Prompt,
        sampling_params: Any = None,
        *,
        options: dict[str, Any] | None = None,
        **extra: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """See :meth:`Engine.generate`; ``sampling_params`` are a ``Sampling``, or what ``sampling`` or a turn gave."""
        params = sampling_params
        if params is None or isinstance(params, (Sampling, Mapping)):
            params = self.sampling(Sampling.of(params))
        if not isinstance(params, ServedParams):
            raise ConfigError("A server takes kvblend_rag's Sampling, or its fields as a dictionary.")
        return self._loop.stream(lambda: self._generate(prompt, params, dict(options or {}), extra))

    async def call(self, method: str, *arguments: Any) -> list[Any]:
        """See :meth:`Engine.call`; a server's workers are asked through its routes alone."""
        raise ConfigError(f"The workers of a server can't be asked for {method!r}: use its routes.")

    async def reset_prefix_cache(self) -> bool:
        """Not to be had over HTTP.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("A server's prefix cache can't be emptied from here.")

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """See :meth:`Engine.run`."""
        return self._loop.run(work)

    def close(self) -> None:
        """Let go of the connection; the server goes on."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(Exception):
                self.run(self._connection.client.close())
            self._connection.close()
            self._loop.stop()

    @cached_property
    def _escapes(self) -> bool:
        return self.template.escapes_tool_results

    async def _generate(
        self, prompt: Prompt, params: ServedParams, options: dict[str, Any], extra: dict[str, Any]
    ) -> AsyncIterator[RequestOutput]:
        body = {**params.body, "extra_body": {**params.body["extra_body"], **extra}}
        wished = {name: value for name, value in options.items() if (name, value) != ("tenant", "")}
        if wished:
            body["extra_body"]["kv_transfer_params"] = {"kvblend": wished}
        if not params.chat:
            body["prompt"] = _as_prompt(prompt)
            body.setdefault("max_tokens", await self._room(body["prompt"]))
        create: Any = self._connection.client.chat.completions if params.chat else self._connection.client.completions
        reading = Reading(params.chat)
        with self._connection.explained():
            answer = await create.create(**body, stream=params.stream)
            if not params.stream:
                output, parsed = reading.output(answer, whole=True)
                params.parsed.extend(parsed)
                yield output
                return
            async with answer:
                async for part in answer:
                    output, parsed = reading.output(part, whole=False)
                    if output.outputs:
                        params.parsed.extend(parsed)
                        yield output
        yield reading.last(await self._report(reading.request_id))

    async def _report(self, request_id: str) -> Mapping[str, Any] | None:
        """A stream does not carry it."""
        try:
            return cast(Mapping[str, Any], await self._connection.aget(f"/reports/{request_id}"))
        except KVBlendError:  # the answer is whole without it
            return None

    async def _room(self, prompt: str | list[int]) -> int:
        """What the context has room for; over HTTP the default is 16."""
        tokens = prompt if isinstance(prompt, list) else await asyncio.to_thread(self._tokenizer.encode, prompt)
        return max(self.info.max_model_len - len(tokens), 1)


def _as_prompt(prompt: Prompt) -> str | list[int]:
    if isinstance(prompt, dict):
        prompt = prompt.get("prompt_token_ids") or prompt["prompt"]
    if isinstance(prompt, str):
        return prompt
    return [int(token) for token in np.asarray(prompt).tolist()]


__all__ = ["HTTPEngine"]
