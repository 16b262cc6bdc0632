"""LlamaIndex's messages as OpenAI's dictionaries, and answers as LlamaIndex's responses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    ChatResponse,
    CitableBlock,
    CompletionResponse,
    LogProb,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.llms.utils import parse_partial_json

from kvblend_rag.conversation.turn import ChatDelta, ChatResult, TokenLogprob, ToolCall

_ROLES = {
    MessageRole.FUNCTION: "tool",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
}


def as_openai(message: ChatMessage) -> dict[str, Any]:
    """A message as OpenAI's dictionary; blocks that are not text keep their type, for the core to refuse."""
    role = _ROLES.get(message.role, message.role.value)
    parts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    converted: dict[str, Any] = {"role": role}
    for block in message.blocks:
        if isinstance(block, TextBlock):
            parts.append({"type": "text", "text": block.text})
        elif isinstance(block, CitableBlock):
            parts += [{"type": "text", "text": each.text} for each in block.content if isinstance(each, TextBlock)]
        elif isinstance(block, ToolCallBlock):
            calls.append(_call(block.tool_call_id, block.tool_name, block.tool_kwargs))
        elif isinstance(block, ThinkingBlock):
            converted["reasoning_content"] = block.content or ""
        elif not isinstance(block, CachePoint):
            parts.append({"type": block.block_type})
    converted["content"] = parts[0]["text"] if len(parts) == 1 and "text" in parts[0] else parts
    given = message.additional_kwargs
    if role == "assistant" and (calls := calls or [_plain(call) for call in given.get("tool_calls") or ()]):
        converted["tool_calls"] = calls
    if role == "tool":
        converted.update({name: given[name] for name in ("tool_call_id", "name") if given.get(name)})
    return converted


def _call(call_id: str | None, name: str, arguments: Any) -> dict[str, Any]:
    return {"id": call_id or "", "type": "function", "function": {"name": name, "arguments": arguments}}


def _plain(call: Any) -> dict[str, Any]:
    """A call as a dictionary; other LLM packages leave OpenAI's objects."""
    plain: Mapping[str, Any] = call if isinstance(call, Mapping) else call.model_dump()
    return _call(plain.get("id"), plain["function"]["name"], plain["function"].get("arguments"))


class Answer:
    """What is known of an answer so far, as LlamaIndex's responses.

    Args:
        model: the model's name.
    """

    def __init__(self, model: str) -> None:
        self._raw: dict[str, Any] = {"model": model}
        self._text, self._reasoning = "", ""
        self._calls: dict[int, ToolCall] = {}
        self._logprobs: list[TokenLogprob] = []
        self._usage: dict[str, int] = {}

    @classmethod
    def of(cls, model: str, result: ChatResult) -> Answer:
        """A finished answer."""
        answer = cls(model)
        answer._text, answer._reasoning = result.text, result.reasoning
        answer._calls = dict(enumerate(result.tool_calls))
        answer._logprobs = list(result.logprobs or ())
        answer._end(result.finish_reason, result)
        return answer

    def add(self, delta: ChatDelta) -> None:
        """Take in what is new."""
        self._text += delta.text
        self._reasoning += delta.reasoning
        self._logprobs += delta.logprobs
        for piece in delta.tool_calls:
            known = self._calls.get(piece.index, ToolCall(id="", name="", arguments=""))
            self._calls[piece.index] = ToolCall(
                id=known.id or piece.id or "",
                name=known.name or piece.name or "",
                arguments=known.arguments + piece.arguments,
            )
        if delta.finish_reason is not None:
            self._raw["finish_reason"] = delta.finish_reason
        if delta.usage is not None:
            self._end(self._raw.get("finish_reason"), delta)

    def _end(self, reason: str | None, last: ChatResult | ChatDelta) -> None:
        assert last.usage is not None
        self._usage = {
            "prompt_tokens": last.usage.input_tokens,
            "completion_tokens": last.usage.output_tokens,
            "total_tokens": last.usage.total_tokens,
            "cached_tokens": last.usage.cache_read,
        }
        self._raw.update(
            finish_reason=reason,
            usage=self._usage,
            report=last.report,
            prompt_token_ids=list(last.prompt_token_ids or ()),
            warnings=list(last.warnings),
        )

    def chat(self, delta: ChatDelta | None = None) -> ChatResponse:
        """As a chat response."""
        blocks: list[Any] = []
        if self._reasoning:
            blocks.append(ThinkingBlock(content=self._reasoning))
        if self._text or not self._calls:
            blocks.append(TextBlock(text=self._text))
        calls = [self._calls[index] for index in sorted(self._calls)]
        blocks += [ToolCallBlock(tool_call_id=c.id, tool_name=c.name, tool_kwargs=c.arguments) for c in calls]
        message = ChatMessage(role=MessageRole.ASSISTANT, blocks=blocks)
        if calls:
            # Structured prediction and agents of llama-index-core look here, not at the blocks.
            message.additional_kwargs["tool_calls"] = [_call(c.id, c.name, c.arguments) for c in calls]
        return ChatResponse(message=message, **self._common(delta))

    def completion(self, delta: ChatDelta | None = None) -> CompletionResponse:
        """As a completion response."""
        return CompletionResponse(text=self._text, **self._common(delta))

    def _common(self, delta: ChatDelta | None) -> dict[str, Any]:
        more: dict[str, Any] = dict(self._usage)
        if delta is not None and delta.reasoning:
            more["thinking_delta"] = delta.reasoning
        logprobs = self._logprobs if delta is None else delta.logprobs
        return {
            "delta": None if delta is None else delta.text,
            "raw": dict(self._raw),
            "logprobs": [_alternatives(each) for each in logprobs] or None,
            "additional_kwargs": more,
        }


def _alternatives(token: TokenLogprob) -> list[LogProb]:
    """The drawn token first, then the others."""
    ranked = [(token.token, token.logprob), *((text, value) for text, value in token.top if text != token.token)]
    return [LogProb(token=text, logprob=value, bytes=list(text.encode())) for text, value in ranked]


def tool_selections(response: ChatResponse) -> list[ToolSelection]:
    """The tool calls of a response, whole or still on their way."""
    return [
        ToolSelection(tool_id=call["id"], tool_name=call["function"]["name"], tool_kwargs=_arguments(call))
        for call in as_openai(response.message).get("tool_calls", ())
    ]


def _arguments(call: Mapping[str, Any]) -> Any:
    given = call["function"]["arguments"]
    if not isinstance(given, str):
        return given or {}
    try:
        return parse_partial_json(given)
    except ValueError:
        return {}


def openai_tools(tools: Iterable[Any]) -> list[dict[str, Any]]:
    """OpenAI's schemas of LlamaIndex's tools."""
    return [tool.metadata.to_openai_tool(skip_length_check=True) for tool in tools]


def as_conversation(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as OpenAI's dictionaries."""
    return [as_openai(message) for message in messages]


__all__ = ["Answer", "as_conversation", "as_openai", "openai_tools", "tool_selections"]
