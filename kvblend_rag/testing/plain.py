"""PlainTurn: reads Hermes tool calls, forced calls in JSON and ``<think>`` reasoning without vLLM."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvblend_rag.conversation.template import ESCAPED, ChatTemplate
from kvblend_rag.conversation.turn import ChatRequest, Parsed, ToolCallDelta, Turn

_CALL = re.compile(r"\s*<tool_call>(.*?)</tool_call>", re.DOTALL)
_MARKS = ("<think>", "</think>", "<tool_call>")


@dataclass
class _Sent:
    raw: str = ""
    text: int = 0
    reasoning: int = 0
    calls: int = 0


class PlainTurn(Turn):
    """A turn read by rules that are simple enough to be right."""

    def __init__(self, request: ChatRequest, template: ChatTemplate, reasons: bool) -> None:
        self._choice = request.choice()
        tools = () if self._choice == "none" else request.tools
        self._reasons = reasons and request.reasoning_parser != "" and not request.sampling.constrained
        self.prompt = template.token_ids(request.messages, tools, **request.template)
        has_results = any(message.get("role") == "tool" for message in request.messages)
        self.warnings = (ESCAPED,) if has_results and template.escapes_tool_results else ()
        self._answers: dict[int, _Sent] = {}

    def delta(self, index: int, text: str, token_ids: Sequence[int], finished: bool) -> Parsed:
        """See :meth:`Turn.delta`; calls come whole."""
        sent = self._answers.setdefault(index, _Sent())
        sent.raw += text
        found = self._read(sent.raw, finished)
        new = Parsed(
            text=found.text[sent.text :],
            reasoning=found.reasoning[sent.reasoning :],
            tool_calls=found.tool_calls[sent.calls :],
        )
        sent.text, sent.reasoning, sent.calls = len(found.text), len(found.reasoning), len(found.tool_calls)
        return new

    def whole(self, text: str, token_ids: Sequence[int]) -> Parsed:
        """See :meth:`Turn.whole`."""
        return self._read(text, True)

    def _read(self, raw: str, finished: bool) -> Parsed:
        """What is certain of an answer so far."""
        if self._choice == "required" or isinstance(self._choice, tuple):
            return self._forced(raw) if finished else Parsed()
        if not finished:
            raw = _without_partial_mark(raw)
        reasoning = ""
        if self._reasons and raw.lstrip().startswith("<think>"):
            reasoning, ended, raw = raw.lstrip().removeprefix("<think>").partition("</think>")
            if not ended:
                return Parsed(reasoning=reasoning)
            raw = raw.lstrip("\n")
        if self._choice == "none":
            return Parsed(text=raw, reasoning=reasoning)
        calls: list[ToolCallDelta] = []
        for body in _CALL.findall(raw):
            call = _call(len(calls), body)
            if call is not None:
                calls.append(call)
        if calls:
            raw = raw[: raw.index("<tool_call>")].rstrip("\n")
        elif not finished:
            raw = raw.split("<tool_call>")[0].rstrip("\n")
        return Parsed(text=raw, reasoning=reasoning, tool_calls=tuple(calls))

    def _forced(self, raw: str) -> Parsed:
        """Native calls, or JSON: an array of calls, or the named tool's arguments."""
        native = [call for index, body in enumerate(_CALL.findall(raw)) if (call := _call(index, body))]
        if native:
            return Parsed(tool_calls=tuple(native))
        if isinstance(self._choice, tuple):
            return Parsed(tool_calls=(ToolCallDelta(index=0, id="call_0", name=self._choice[0], arguments=raw),))
        try:
            given = json.loads(raw)
            calls = [_made(index, each["name"], each["parameters"]) for index, each in enumerate(given)]
        except (json.JSONDecodeError, KeyError, TypeError):
            return Parsed(text=raw)
        return Parsed(tool_calls=tuple(calls))


def _call(index: int, body: str) -> ToolCallDelta | None:
    try:
        given = json.loads(body)
        return _made(index, given["name"], given.get("arguments", {}))
    except (json.JSONDecodeError, KeyError, TypeError):
        return None


def _made(index: int, name: str, arguments: Any) -> ToolCallDelta:
    return ToolCallDelta(
        index=index, id=f"call_{index}", name=name, arguments=json.dumps(arguments, ensure_ascii=False)
    )


def _without_partial_mark(raw: str) -> str:
    """Without an end that may be the beginning of a mark."""
    for mark in _MARKS:
        for length in range(len(mark) - 1, 0, -1):
            if raw.endswith(mark[:length]):
                return raw[:-length].rstrip("\n")
    return raw.rstrip("\n")


__all__ = ["PlainTurn"]
