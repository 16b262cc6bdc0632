"""ChatTemplate: a model's own chat template, what it can't do made up for, and what it does to tools' results.

A template that knows no tools gets their descriptions in the system message and past calls and results as
text, in the Hermes style that Qwen2.5 and many others are trained on: ``<tools>`` in the system message,
``<tool_call>`` around a call, ``<tool_response>`` around a result. Their parser in vLLM is ``hermes``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from kvblend_rag.errors import ConfigError

Message = Mapping[str, Any]

ESCAPED = "tool_results_escaped"
"""The warning's name: newlines in tools' results reach the model as the two characters ``\\n``."""

_PROBE = "kvblend first\nkvblend second"
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "kvblend_probe",
        "description": "Probe.",
        "parameters": {"type": "object", "properties": {"q": {"type": "string", "description": "Probe."}}},
    },
}
_HERMES_SYSTEM = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


class ChatTemplate:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @property
    def source(self) -> str:
        """The template's text; of several, the one for tools; empty when there is none."""
        given = getattr(self._tokenizer, "chat_template", None) or ""
        if isinstance(given, Mapping):
            given = given.get("tool_use") or given.get("default") or ""
        return str(given)

    @cached_property
    def knows_tools(self) -> bool:
        """Whether the template itself tells the model about tools."""
        user = {"role": "user", "content": "probe"}
        try:
            return "kvblend_probe" in self._apply([user], [_PROBE_TOOL])
        except Exception:  # a template raises errors of its own kind
            return False

    @cached_property
    def escapes_tool_results(self) -> bool:
        """Whether a tool's result passes through ``tojson``, so that no stored chunk of several lines is found."""
        messages = [
            {"role": "user", "content": "probe"},
            _assistant({"role": "assistant", "tool_calls": [_call("kvbprobe1", "kvblend_probe", {"q": "probe"})]}),
            {"role": "tool", "name": "kvblend_probe", "tool_call_id": "kvbprobe1", "content": _PROBE},
        ]
        try:
            text = self.text(messages, [_PROBE_TOOL])
        except ConfigError:
            return False
        return _PROBE not in text and json.dumps(_PROBE)[1:-1] in text

    def text(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), **options: Any) -> str:
        """A conversation as the model reads it.

        Args:
            messages: OpenAI's dictionaries.
            tools: OpenAI's function schemas.
            options: passed on to the template; ``add_generation_prompt`` is true unless given.

        Raises:
            ConfigError: there is no template, or it does not take these messages.
        """
        if not self.source:
            raise ConfigError("The model has no chat template: give it a prompt of your own, not messages.")
        plain = [_plain(message) for message in messages]
        if not self.knows_tools:
            plain, tools = _as_hermes(plain, tools), ()
        try:
            return self._apply(plain, list(tools), **options)
        except Exception as error:
            folded = _without_system(plain)
            if folded is None:
                raise ConfigError(f"The chat template does not take these messages: {_first_line(error)}") from error
        try:
            return self._apply(folded, list(tools), **options)
        except Exception as error:
            raise ConfigError(f"The chat template does not take these messages: {_first_line(error)}") from error

    def token_ids(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), **options: Any
    ) -> list[int]:
        """``text`` as token ids; the template writes the special tokens itself."""
        text = self.text(messages, tools, **options)
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False)]

    def _apply(self, messages: list[dict[str, Any]], tools: list[Any], **options: Any) -> str:
        options = {"add_generation_prompt": True, **options}
        if tools:
            options["tools"] = tools
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **options))


def flat_text(content: Any) -> str:
    """A message's content as text: parts are joined by a newline, as vLLM's server does.

    Raises:
        ConfigError: a part that is not text.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        raise ConfigError(f"A message's content is {type(content).__name__}; it must be text or a list of text parts.")
    texts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            kind = part.get("type", "unknown") if isinstance(part, Mapping) else type(part).__name__
            raise ConfigError(f"A message holds a part of type {kind!r}; this model reads text only.")
        texts.append(text)
    return "\n".join(texts)


def _plain(message: Message) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str):
        raise ConfigError(f"A message has no role: {dict(message)!r}.")
    if role == "developer":
        role = "system"
    plain = {**message, "role": role, "content": flat_text(message.get("content"))}
    return _assistant(plain) if role == "assistant" else plain


def _assistant(message: Message) -> dict[str, Any]:
    """Templates want arguments as objects, the API has them as text."""
    message = {**message, "content": message.get("content") or ""}
    calls = []
    for call in message.pop("tool_calls", None) or ():
        function = dict(call["function"])
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except json.JSONDecodeError:
                arguments = {"invalid": arguments}
        calls.append({**call, "type": "function", "function": {**function, "arguments": arguments}})
    if calls:
        message["tool_calls"] = calls
    return message


def _call(call_id: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _as_hermes(messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation without tool roles, tool calls and ``tools``."""
    written: list[dict[str, Any]] = []
    after_tool = False
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if after_tool:  # results of parallel calls share one message: roles must alternate
                written[-1]["content"] += "\n" + text
            else:
                written.append({"role": "user", "content": text})
        else:
            calls = [
                f"<tool_call>\n{json.dumps(_name_and_arguments(call), ensure_ascii=False)}\n</tool_call>"
                for call in message.get("tool_calls", ())
            ]
            content = "\n".join([message["content"], *calls] if message["content"] else calls)
            written.append({"role": message["role"], "content": content})
        after_tool = message["role"] == "tool"
    if tools:
        described = _HERMES_SYSTEM.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        if written and written[0]["role"] == "system":
            written[0]["content"] += "\n\n" + described
        else:
            written.insert(0, {"role": "system", "content": described})
    return written


def _name_and_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}


def _without_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The system text in front of the first user message, for templates without a system role."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return None
    text = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [{**messages[1], "content": text}, *messages[2:]]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


__all__ = ["ESCAPED", "ChatTemplate", "flat_text"]
