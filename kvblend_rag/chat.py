"""Chat: turns of a conversation and plain completions over a KVBlend; no vLLM, no framework.

What LangChain's and LlamaIndex's models are made of. The engine starts with the first request.
"""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from kvblend_rag.conversation.answer import AnswerReader
from kvblend_rag.conversation.sampling import Sampling
from kvblend_rag.conversation.template import ESCAPED
from kvblend_rag.conversation.turn import ChatDelta, ChatRequest, ChatResult, ModelProfile, Turn
from kvblend_rag.engine import Engine
from kvblend_rag.errors import KVBlendWarning, RequestTimeout
from kvblend_rag.kvblend import KVBlend
from kvblend_rag.output import RequestOutput, last

Message = Mapping[str, Any]
SamplingLike = Sampling | Mapping[str, Any] | None
T = TypeVar("T")


class Chat:
    """Answers conversations and prompts through one engine.

    Args:
        kv: engine and store; several chats may share it.
        tool_parser: vLLM's name of the parser of tool calls; None: chosen from the chat template.
        reasoning_parser: vLLM's name of the parser of reasoning; None: chosen; empty: none.
        timeout: seconds a request may take; None for no bound.
    """

    def __init__(
        self,
        kv: KVBlend,
        *,
        tool_parser: str | None = None,
        reasoning_parser: str | None = None,
        timeout: float | None = None,
    ) -> None:
        self.kv = kv
        self._tool_parser, self._reasoning_parser = tool_parser, reasoning_parser
        self._timeout = timeout
        self._warned = False

    @property
    def profile(self) -> ModelProfile:
        """What the model can do; starts the engine."""
        return self.kv.engine.profile

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, by the model's tokenizer, without special tokens."""
        return len(self.token_ids(text))

    def token_ids(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return [int(token) for token in self.kv.engine.tokenizer.encode(text, add_special_tokens=False)]

    async def stream(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        sampling: SamplingLike = None,
        blend: Mapping[str, Any] | None = None,
        template: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> AsyncGenerator[ChatDelta, None]:
        """One turn, as it comes; iterate in any event loop, leave (or cancel) to abort the request.

        Args:
            messages: OpenAI's dictionaries.
            tools: OpenAI's function schemas.
            tool_choice: ``auto``, ``none``, ``any`` or ``required``, a tool's name, or OpenAI's dictionary. Any and
                a name constrain the answer to the tools' schemas, so that it always validates.
            parallel_tool_calls: False: at most one call.
            sampling: a ``Sampling``, or its fields as a dictionary; an OpenAI ``response_format`` may be among them.
            blend: this request's blending: ``blend``, ``selector``, ``ratio``, ``span``.
            template: passed on to the chat template.
            timeout: seconds; None: the chat's own.

        Raises:
            PromptTooLong: the conversation leaves no room in the context.
            RequestTimeout: it took longer than ``timeout``; the request is aborted.
            ConfigError: a value that can't be used.
        """
        request = self._request(messages, tools, tool_choice, parallel_tool_calls, sampling, template)
        engine = await self._started()
        turn = self._turn(engine, request, stream=True)
        reader = AnswerReader(turn, engine.tokenizer, parallel_tool_calls)
        async with aclosing(self._outputs(turn.prompt, turn.params, blend, timeout)) as outputs:
            async for output in outputs:
                for delta in reader.deltas(output):
                    yield delta

    async def complete(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        sampling: SamplingLike = None,
        blend: Mapping[str, Any] | None = None,
        template: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> ChatResult:
        """One turn, finished. Arguments and errors as for :meth:`stream`."""
        request = self._request(messages, tools, tool_choice, parallel_tool_calls, sampling, template)
        engine = await self._started()
        turn = self._turn(engine, request, stream=False)
        output = await last(self._outputs(turn.prompt, turn.params, blend, timeout))
        return AnswerReader(turn, engine.tokenizer, parallel_tool_calls).result(output)

    async def stream_text(
        self,
        prompt: str | Sequence[int],
        *,
        sampling: SamplingLike = None,
        blend: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> AsyncGenerator[ChatDelta, None]:
        """A text (or token ids) continued as it stands, without a chat template; as :meth:`stream`."""
        settings = Sampling.of(sampling)
        engine = await self._started()
        reader = AnswerReader(None, engine.tokenizer)
        params = engine.sampling(settings, stream=True)
        async with aclosing(self._outputs(prompt, params, blend, timeout)) as outputs:
            async for output in outputs:
                for delta in reader.deltas(output):
                    yield delta

    async def complete_text(
        self,
        prompt: str | Sequence[int],
        *,
        sampling: SamplingLike = None,
        blend: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> ChatResult:
        """A text continued, finished. Arguments as for :meth:`stream_text`."""
        settings = Sampling.of(sampling)
        engine = await self._started()
        output = await last(self._outputs(prompt, engine.sampling(settings), blend, timeout))
        return AnswerReader(None, engine.tokenizer).result(output)

    def complete_sync(self, messages: Sequence[Message], **options: Any) -> ChatResult:
        """:meth:`complete`, waited for; also from a thread whose own loop may wait."""
        return self._run(lambda: self.complete(messages, **options))

    def complete_text_sync(self, prompt: str | Sequence[int], **options: Any) -> ChatResult:
        """:meth:`complete_text`, waited for."""
        return self._run(lambda: self.complete_text(prompt, **options))

    def complete_batch(self, conversations: Sequence[Sequence[Message]], **options: Any) -> list[ChatResult]:
        """Several turns in one batch of the engine; results in order."""
        return self._run(lambda: _together([self.complete(messages, **options) for messages in conversations]))

    def complete_text_batch(self, prompts: Sequence[str | Sequence[int]], **options: Any) -> list[ChatResult]:
        """Several texts in one batch of the engine; results in order."""
        return self._run(lambda: _together([self.complete_text(prompt, **options) for prompt in prompts]))

    def stream_sync(self, messages: Sequence[Message], **options: Any) -> Iterator[ChatDelta]:
        """:meth:`stream` for callers without a loop; closing the iterator aborts the request."""
        return self._iterate(self.stream(messages, **options))

    def stream_text_sync(self, prompt: str | Sequence[int], **options: Any) -> Iterator[ChatDelta]:
        """:meth:`stream_text` for callers without a loop; closing the iterator aborts the request."""
        return self._iterate(self.stream_text(prompt, **options))

    async def _started(self) -> Engine:
        # In a thread: a start takes half a minute, and the caller's loop has other things to do.
        return await asyncio.to_thread(lambda: self.kv.engine)

    def _request(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        tool_choice: str | Mapping[str, Any] | None,
        parallel_tool_calls: bool,
        sampling: SamplingLike,
        template: Mapping[str, Any] | None,
    ) -> ChatRequest:
        return ChatRequest(
            messages=messages,
            tools=tools,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            sampling=Sampling.of(sampling),
            template=dict(template or {}),
            tool_parser=self._tool_parser,
            reasoning_parser=self._reasoning_parser,
        )

    def _turn(self, engine: Engine, request: ChatRequest, *, stream: bool) -> Turn:
        turn = engine.turn(request, stream=stream)
        if ESCAPED in turn.warnings and not self._warned:
            self._warned = True
            warnings.warn(
                "This model's chat template escapes the newlines in tools' results, so stored chunks of several "
                "lines are not found there: put retrieved text into a user or system message, or pass another "
                "chat_template.",
                KVBlendWarning,
                stacklevel=2,
            )
        return turn

    async def _outputs(
        self,
        prompt: str | Sequence[int],
        params: Any,
        blend: Mapping[str, Any] | None,
        timeout: float | None,
    ) -> AsyncGenerator[RequestOutput, None]:
        bound = self._timeout if timeout is None else timeout
        end = None if bound is None else time.monotonic() + bound
        outputs = self.kv.stream(prompt, params, blend=blend)
        try:
            while True:
                try:
                    left = None if end is None else max(end - time.monotonic(), 0)
                    output = await asyncio.wait_for(_next(outputs), left) if end else await _next(outputs)
                except StopAsyncIteration:
                    return
                except (TimeoutError, asyncio.TimeoutError) as error:  # noqa: UP041 (two kinds in Python 3.10)
                    if bound is None or isinstance(error, RequestTimeout):
                        raise  # the engine's own
                    raise RequestTimeout(f"The request took longer than {bound:g} seconds and was stopped.") from None
                yield output
        finally:
            await outputs.aclose()

    def _run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return self.kv.engine.run(work())

    def _iterate(self, deltas: AsyncGenerator[ChatDelta, None]) -> Iterator[ChatDelta]:
        engine = self.kv.engine
        try:
            while True:
                try:
                    yield engine.run(_next(deltas))
                except StopAsyncIteration:
                    return
        finally:
            engine.run(deltas.aclose())


async def _next(iterator: AsyncIterator[T]) -> T:
    return await iterator.__anext__()


async def _together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    return list(await asyncio.gather(*work))


__all__ = ["Chat"]
