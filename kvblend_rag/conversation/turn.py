"""One turn of a conversation, or one completion: what is asked, and what comes back. Plain data, no engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvblend_rag.conversation.sampling import Sampling
from kvblend_rag.errors import ConfigError
from kvblend_rag.report import BlendReport


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A conversation to be continued.

    ``messages`` and ``tools`` are OpenAI's dictionaries: roles system, user, assistant (with
    ``tool_calls``) and tool (with ``tool_call_id``); ``{"type": "function", "function": {…}}``.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str | Mapping[str, Any] | None = None
    """``auto`` (the default with tools), ``none``, ``required`` or ``any``, or a tool's name; OpenAI's
    ``{"type": "function", "function": {"name": …}}`` too."""
    parallel_tool_calls: bool = True
    """False: at most one call an answer."""
    sampling: Sampling = field(default_factory=Sampling)
    template: dict[str, Any] = field(default_factory=dict)
    """Passed on to the chat template, such as ``enable_thinking``."""
    tool_parser: str | None = None
    """vLLM's name of the parser of tool calls; None: chosen from the model's chat template."""
    reasoning_parser: str | None = None
    """vLLM's name of the parser of reasoning; None: chosen from the chat template; empty: none."""

    def choice(self) -> str | tuple[str]:
        """``auto``, ``none`` or ``required``, or a tool's name alone in a tuple.

        Raises:
            ConfigError: it names no tool of the request, or asks for one where there are none.
        """
        given = self.tool_choice
        if isinstance(given, Mapping):
            given = given.get("function", given).get("name") or given.get("type")
        if given is None or given == "auto":
            return "auto" if self.tools else "none"
        if given == "none":
            return "none"
        if not self.tools:
            raise ConfigError(f"tool_choice is {given!r}, and the request has no tools.")
        if given in ("any", "required"):
            return "required"
        names = [tool["function"]["name"] for tool in self.tools]
        if given not in names:
            raise ConfigError(f"tool_choice is {given!r}; the request's tools are {', '.join(names)}.")
        return (str(given),)


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A whole call of a tool."""

    id: str
    name: str
    arguments: str
    """JSON; incomplete when the answer ran out of tokens."""


@dataclass(frozen=True, kw_only=True)
class ToolCallDelta:
    """A further piece of a call. The first piece of each ``index`` carries ``id`` and ``name``."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """A drawn token and its natural log-probability."""

    token: str
    token_id: int
    logprob: float
    top: tuple[tuple[str, float], ...] = ()
    """The most likely tokens with their log-probabilities."""

    def to_openai(self) -> dict[str, Any]:
        """An entry of OpenAI's ``logprobs.content``."""
        return {
            **_openai(self.token, self.logprob),
            "top_logprobs": [_openai(token, logprob) for token, logprob in self.top],
        }


def _openai(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of one request."""

    input_tokens: int = 0
    output_tokens: int = 0
    """Of all ``n`` answers."""
    cache_read: int = 0
    """Input tokens not computed: from the exact prefix cache, and of stored chunks as stored."""

    @property
    def total_tokens(self) -> int:
        """Input and output."""
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True, kw_only=True)
class ChatDelta:
    """What is new since the last delta. Texts joined in order are the whole, nothing twice, nothing lost."""

    index: int = 0
    """Which of the ``n`` answers."""
    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    """On the last of an answer: ``stop``, ``length`` or ``tool_calls``."""
    usage: Usage | None = None
    """On the very last."""
    report: BlendReport | None = None
    """On the very last."""
    prompt_token_ids: tuple[int, ...] | None = field(default=None, repr=False)
    """On the very last."""
    warnings: tuple[str, ...] = ()
    """On the very last: as ``ChatResult.warnings``."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One of the answers drawn."""

    text: str = ""
    """Without tool calls and reasoning."""
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""
    finish_reason: str = "stop"
    """``stop``, ``length`` or ``tool_calls``."""
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class ChatResult:
    """A finished turn or completion; its first answer's fields are its own."""

    generations: tuple[Generation, ...]
    usage: Usage
    report: BlendReport
    prompt_token_ids: tuple[int, ...] = field(default=(), repr=False)
    ttft: float | None = None
    """Seconds to the first token, loading included."""
    warnings: tuple[str, ...] = ()
    """Named reasons why less could be reused than should: ``tool_results_escaped``."""

    @property
    def text(self) -> str:
        """The first answer's text."""
        return self.generations[0].text

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The first answer's tool calls."""
        return self.generations[0].tool_calls

    @property
    def reasoning(self) -> str:
        """The first answer's reasoning."""
        return self.generations[0].reasoning

    @property
    def finish_reason(self) -> str:
        """Why the first answer ended."""
        return self.generations[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """The first answer's log-probabilities, when asked for."""
        return self.generations[0].logprobs


@dataclass(frozen=True, kw_only=True)
class ModelProfile:
    """What a model can do."""

    max_input_tokens: int
    """The whole context."""
    tool_calling: bool = True
    structured_output: bool = True
    reasoning_output: bool = False
    native_tools: bool = True
    """Whether the chat template knows tools; else their descriptions go into the system message."""


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """Generated text, taken apart."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    """In whole outputs each is a whole call."""


class Turn(ABC):
    """A request, ready for an engine, and how its output is read. One a request."""

    prompt: list[int]
    """Token ids."""
    params: Any
    """The engine's sampling parameters."""
    warnings: tuple[str, ...] = ()

    @abstractmethod
    def delta(self, index: int, text: str, token_ids: Sequence[int], finished: bool) -> Parsed:
        """Take apart what answer ``index`` has gained."""

    @abstractmethod
    def whole(self, text: str, token_ids: Sequence[int]) -> Parsed:
        """Take apart a whole answer."""


__all__ = [
    "ChatDelta",
    "ChatRequest",
    "ChatResult",
    "Generation",
    "ModelProfile",
    "Parsed",
    "TokenLogprob",
    "ToolCall",
    "ToolCallDelta",
    "Turn",
    "Usage",
]
