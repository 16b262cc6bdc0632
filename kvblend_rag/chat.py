"""Chat: turns of a conversation and plain completions over a KVBlend; no vLLM, no framework.

What LangChain's and LlamaIndex's models are made of. The engine starts with the first request.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

from kvblend_rag.kvblend import KVBlend
from kvblend_rag.turn import ChatDelta, ChatRequest, ChatResult, ModelProfile, Sampling

SamplingLike = Sampling | Mapping[str, Any] | None


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
        raise NotImplementedError

    @property
    def profile(self) -> ModelProfile:
        """What the model can do; starts the engine."""
        raise NotImplementedError

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, by the model's tokenizer, without special tokens."""
        raise NotImplementedError

    def token_ids(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        raise NotImplementedError

    def stream(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        sampling: SamplingLike = None,
        blend: Mapping[str, Any] | None = None,
        template: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[ChatDelta]:
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
        raise NotImplementedError

    async def complete(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> ChatResult:
        """One turn, finished. Arguments and errors as for :meth:`stream`."""
        raise NotImplementedError

    def stream_text(
        self,
        prompt: str | Sequence[int],
        *,
        sampling: SamplingLike = None,
        blend: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[ChatDelta]:
        """A text continued as it stands, without a chat template; as :meth:`stream`."""
        raise NotImplementedError

    async def complete_text(self, prompt: str | Sequence[int], **options: Any) -> ChatResult:
        """A text continued, finished. Arguments as for :meth:`stream_text`."""
        raise NotImplementedError

    # For callers without an event loop:

    def complete_sync(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> ChatResult:
        """:meth:`complete` from a thread without a loop (or from one whose loop may wait)."""
        raise NotImplementedError

    def stream_sync(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Iterator[ChatDelta]:
        """:meth:`stream` from a thread without a loop; closing the iterator aborts the request."""
        raise NotImplementedError

    def complete_batch(self, conversations: Sequence[Sequence[Mapping[str, Any]]], **options: Any) -> list[ChatResult]:
        """Several turns in one batch of the engine, results in order."""
        raise NotImplementedError

    def complete_text_sync(self, prompt: str | Sequence[int], **options: Any) -> ChatResult:
        """:meth:`complete_text` from a thread without a loop."""
        raise NotImplementedError

    def stream_text_sync(self, prompt: str | Sequence[int], **options: Any) -> Iterator[ChatDelta]:
        """:meth:`stream_text` from a thread without a loop."""
        raise NotImplementedError

    def complete_text_batch(self, prompts: Sequence[str | Sequence[int]], **options: Any) -> list[ChatResult]:
        """Several texts in one batch of the engine, results in order."""
        raise NotImplementedError


__all__ = ["Chat"]
