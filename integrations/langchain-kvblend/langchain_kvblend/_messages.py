"""LangChain's messages as OpenAI's dictionaries, and answers as LangChain's messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.exceptions import OutputParserException
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ToolMessage,
    convert_to_openai_messages,
)
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.output_parsers.openai_tools import make_invalid_tool_call, parse_tool_call

from kvblend_rag.conversation.turn import ChatDelta, ChatResult, Generation, ToolCall, Usage

PROVIDER = "kvblend"

# Parts of an assistant's content that the conversation holds elsewhere, or that no model reads again.
_HELD_ELSEWHERE = frozenset(
    {
        "invalid_tool_call",
        "reasoning",
        "redacted_thinking",
        "server_tool_call",
        "server_tool_result",
        "thinking",
        "tool_call",
        "tool_call_chunk",
    }
)
_NOT_TEXT = frozenset({"audio", "file", "image", "image_url", "input_audio", "media", "video"})


def as_openai(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Messages as the engine takes them; parts that are not text are left for it to refuse."""
    converted = []
    for message in messages:
        plain = message.model_copy(update={"content": _content(message)})
        for each in convert_to_openai_messages([plain], pass_through_unknown_blocks=True):
            if each["role"] == "function":
                each["role"] = "tool"
            converted.append(each)
        if isinstance(message, AIMessage):
            _restore(message, converted[-1])
    return converted


def _restore(message: AIMessage, converted: dict[str, Any]) -> None:
    """What the conversion leaves out: calls that could not be parsed, and the reasoning some templates show."""
    for call in message.invalid_tool_calls:
        function = {"name": call.get("name") or "", "arguments": call.get("args") or ""}
        converted.setdefault("tool_calls", []).append({"type": "function", "id": call.get("id"), "function": function})
    reasoning = message.additional_kwargs.get("reasoning_content")
    if reasoning:
        converted["reasoning_content"] = reasoning


def _content(message: BaseMessage) -> str | list[Any]:
    if isinstance(message.content, str):
        return message.content
    return [part for block in message.content for part in _part(message, block)]


def _part(message: BaseMessage, block: str | dict[str, Any]) -> list[str | dict[str, Any]]:
    if isinstance(block, str):
        return [block]
    kind = block.get("type")
    if isinstance(message, AIMessage) and kind in _HELD_ELSEWHERE:
        return []
    if kind in ("text", "text-plain", None) and isinstance(block.get("text"), str):
        return [{"type": "text", "text": block["text"]}]
    if isinstance(message, ToolMessage) and kind not in _NOT_TEXT:
        return [{"type": "text", "text": json.dumps(block.get("json", block), ensure_ascii=False, default=str)}]
    return [block]


def as_message(answer: Generation, metadata: Mapping[str, Any], usage: Usage | None) -> AIMessage:
    """One finished answer."""
    calls: list[Any] = []
    invalid: list[Any] = []
    for call in answer.tool_calls:
        _read_call(call, calls, invalid)
    return AIMessage(
        content=answer.text,
        additional_kwargs={"reasoning_content": answer.reasoning} if answer.reasoning else {},
        tool_calls=calls,
        invalid_tool_calls=invalid,
        usage_metadata=None if usage is None else as_usage(usage),
        response_metadata={**metadata, "finish_reason": answer.finish_reason, **logprobs_of(answer.logprobs)},
    )


def _read_call(call: ToolCall, calls: list[Any], invalid: list[Any]) -> None:
    raw = {"id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
    try:
        calls.append(parse_tool_call(raw, return_id=True))
    except (OutputParserException, ValueError) as error:
        invalid.append(make_invalid_tool_call(raw, str(error)))


def as_chunk(delta: ChatDelta, last_metadata: Mapping[str, Any]) -> AIMessageChunk | None:
    """One piece of an answer, nothing when there is nothing new.

    Args:
        delta: what is new.
        last_metadata: response metadata for the last piece.
    """
    last = delta.usage is not None
    new = delta.text or delta.reasoning or delta.tool_calls or delta.logprobs or delta.finish_reason
    if not new and not last:
        return None
    metadata: dict[str, Any] = {"model_provider": PROVIDER, **logprobs_of(delta.logprobs or None)}
    if delta.finish_reason:
        metadata["finish_reason"] = delta.finish_reason
    return AIMessageChunk(
        content=delta.text,
        additional_kwargs={"reasoning_content": delta.reasoning} if delta.reasoning else {},
        tool_call_chunks=[
            tool_call_chunk(name=call.name, args=call.arguments, id=call.id, index=call.index)
            for call in delta.tool_calls
        ],
        usage_metadata=None if delta.usage is None else as_usage(delta.usage),
        response_metadata={**metadata, **last_metadata} if last else metadata,
        chunk_position="last" if last else None,
    )


def response_metadata(answer: ChatResult | ChatDelta, model: str) -> dict[str, Any]:
    """What is said once of an answer: the model, and what blending did."""
    metadata: dict[str, Any] = {"model_name": model, "model_provider": PROVIDER}
    if answer.report is not None:
        metadata["blend_report"] = answer.report.to_dict()
    if answer.warnings:
        metadata["blend_warnings"] = list(answer.warnings)
    return metadata


def as_usage(usage: Usage) -> UsageMetadata:
    """Token counts, with those that needed no computing."""
    return UsageMetadata(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        total_tokens=usage.total_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.cache_read),
    )


def logprobs_of(logprobs: Any) -> dict[str, Any]:
    """OpenAI's ``logprobs`` entry; nothing when there are none."""
    return {} if logprobs is None else {"logprobs": {"content": [each.to_openai() for each in logprobs]}}


__all__ = ["PROVIDER", "as_chunk", "as_message", "as_openai", "as_usage", "logprobs_of", "response_metadata"]
