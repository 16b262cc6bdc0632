"""ServedTurn: a conversation that the server renders and whose answer it takes apart; and what is asked of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvblend_rag.conversation.sampling import Sampling
from kvblend_rag.conversation.turn import ChatRequest, Parsed, Turn

_OF_OPENAI = frozenset(
    {"temperature", "top_p", "seed", "max_tokens", "presence_penalty", "frequency_penalty", "stop", "n"}
)


@dataclass
class ServedParams:
    """The body of a request, and what the server has taken apart of its answer."""

    body: dict[str, Any]
    """Arguments of OpenAI's client; what is vLLM's own is in ``extra_body``."""
    stream: bool = False
    chat: bool = False
    parsed: deque[Parsed] = field(default_factory=deque)
    """One an output, in order."""


class ServedTurn(Turn):
    """Hands on what the server has parsed.

    Args:
        request: the conversation.
        model: its name on the server.
        stream: outputs hold what is new since the last.
        warnings: see ``Turn``.

    Raises:
        ConfigError: a tool choice that names no tool.
    """

    def __init__(self, request: ChatRequest, model: str, stream: bool, warnings: tuple[str, ...] = ()) -> None:
        self.prompt = []  # the server renders the messages
        self.warnings = warnings
        body = request_body(request.sampling, model, chat=True)
        body["messages"] = [dict(each) for each in request.messages]
        choice = request.choice()
        if request.tools and choice != "none":
            forced = choice != "auto"
            body["tools"] = [_strict(each) if forced else dict(each) for each in request.tools]
            body["parallel_tool_calls"] = request.parallel_tool_calls
            named = {"type": "function", "function": {"name": choice[0]}}
            body["tool_choice"] = named if isinstance(choice, tuple) else choice
        if request.template:
            body["extra_body"]["chat_template_kwargs"] = dict(request.template)
        if request.reasoning_parser == "":
            body["extra_body"]["include_reasoning"] = False
        self.params = ServedParams(body, stream, chat=True)

    def delta(self, index: int, text: str, token_ids: Sequence[int], finished: bool) -> Parsed:
        """See :meth:`Turn.delta`."""
        parsed: deque[Parsed] = self.params.parsed
        return parsed.popleft()

    def whole(self, text: str, token_ids: Sequence[int]) -> Parsed:
        """See :meth:`Turn.whole`."""
        parsed: deque[Parsed] = self.params.parsed
        return parsed.popleft() if parsed else Parsed(text=text)


def _strict(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Without the mark, vLLM constrains a call's syntax and not its arguments."""
    return {**tool, "function": {**tool["function"], "strict": True}}


def request_body(settings: Sampling, model: str, *, chat: bool) -> dict[str, Any]:
    """Sampling settings as arguments of OpenAI's client."""
    values = settings.given()
    if settings.stop:
        values["stop"] = list(settings.stop)
    if settings.n != 1:
        values["n"] = settings.n
    extra = {"return_token_ids": True, **settings.extra}
    extra |= {name: values.pop(name) for name in list(values) if name not in _OF_OPENAI}
    if settings.logprobs or settings.top_logprobs:
        values |= {"logprobs": True, "top_logprobs": settings.top_logprobs} if chat else {}
        values |= {} if chat else {"logprobs": settings.top_logprobs}
    form = {"json": settings.json_schema, "regex": settings.regex, "json_object": settings.json_object or None}
    chosen = {name: value for name, value in form.items() if value is not None}
    if chosen:
        extra["structured_outputs"] = chosen
    return {"model": model, **values, "extra_body": extra}


__all__ = ["ServedParams", "ServedTurn", "request_body"]
