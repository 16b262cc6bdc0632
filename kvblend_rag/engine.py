"""Engine: what the package asks of an inference engine. vLLM is behind it; nothing here knows it.

Engines run on a loop of their own, in a thread of their own. ``generate`` may be iterated in any event
loop, ``run`` is for callers without one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias, TypeVar

from kvblend_rag.blend.chunk import TokenIds
from kvblend_rag.conversation import dialect
from kvblend_rag.conversation.sampling import Sampling
from kvblend_rag.conversation.template import ChatTemplate
from kvblend_rag.conversation.turn import ChatRequest, ModelProfile, Turn
from kvblend_rag.output import RequestOutput

Prompt: TypeAlias = "str | Sequence[int] | TokenIds | dict[str, Any]"
"""Text, token ids, or one of vLLM's prompt dictionaries."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What an engine runs."""

    model: str
    max_model_len: int
    dtype: str
    device: str
    version: str
    """Name and version of the inference engine."""
    fingerprint: str
    """Digest of model, dtype, rotary parameters and tokenizer: half of a chunk's namespace."""
    context: tuple[int, ...]
    """Token ids of the ingest context: the other half."""
    refusal: str | None
    """Why this model can't be blended; None when it can."""
    header: tuple[int, ...] | None = None
    """Token ids that chunks are computed behind a second time, as openings; None where they are not."""
    permit: str = field(default="", repr=False)
    """What an ingest shows the engine to stand behind a companion, which over HTTP nobody may; empty: there are none.
    """
    architectures: tuple[str, ...] = ()
    """As the model's configuration names them."""


@dataclass(frozen=True, kw_only=True)
class Watched:
    """Sampling parameters whose outputs also tell how likely each token was."""

    sampling_params: Any
    """With log-probabilities of the two likeliest tokens of each step at least."""
    keep: int | None
    """The argument of ``RequestOutput.with_logprobs`` that leaves what was asked for."""
    in_parts: bool
    """An output holds what is new since the last."""
    count: int
    """Answers of one prompt."""


class Engine(ABC):
    """An inference engine with a chunk store."""

    info: EngineInfo
    chunks_at_once: int = 64
    """Chunks in its hands at a time when texts are ingested: enough to fill vLLM's batches."""
    documents: Any = None
    """An ``ingest.Documents`` where the store is the engine's own business; None: it is used through ``call``."""

    @property
    @abstractmethod
    def tokenizer(self) -> Any:
        """The model's tokenizer, with the interface of Transformers."""

    @cached_property
    def template(self) -> ChatTemplate:
        """The model's chat template."""
        return ChatTemplate(self.tokenizer)

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), **template: Any
    ) -> list[int]:
        """The token ids of a conversation, as vLLM's chat endpoint would make them.

        Raises:
            ConfigError: there is no chat template, or it does not take these messages.
        """
        return self.template.token_ids(messages, tools, **template)

    @cached_property
    def profile(self) -> ModelProfile:
        """What the model can do."""
        return ModelProfile(
            max_input_tokens=self.info.max_model_len,
            tool_calling=bool(self.template.source),
            reasoning_output=bool(dialect.reasoning_parser(self.template.source, self.info.architectures)),
            native_tools=self.template.knows_tools,
        )

    @abstractmethod
    def sampling(self, settings: Sampling, *, stream: bool = False) -> Any:
        """This engine's sampling parameters.

        Args:
            settings: how the answer is drawn, and its form.
            stream: outputs hold what is new since the last, instead of one output at the end.

        Raises:
            ConfigError: a value that can't be used.
        """

    @abstractmethod
    def turn(self, request: ChatRequest, *, stream: bool = False) -> Turn:
        """A conversation's prompt and sampling parameters, and the parsers of its output.

        Raises:
            ConfigError: a message, tool, parser or value that can't be used.
        """

    @abstractmethod
    def one_token(self) -> Any:
        """Sampling parameters of a request that only computes its prompt."""

    @abstractmethod
    def watched(self, sampling_params: Any, *, whole: bool = False, most: int | None = None) -> Watched:
        """Sampling parameters whose outputs also tell how likely each token was.

        Args:
            sampling_params: the engine's; None for its defaults.
            whole: there is one output, at the end.
            most: tokens that the answer may have, if they leave it more.
        """

    @abstractmethod
    def generate(
        self,
        prompt: Prompt,
        sampling_params: Any = None,
        *,
        options: dict[str, Any] | None = None,
        **extra: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one request as they come, cumulative unless the sampling parameters say otherwise.

        Leaving the iteration aborts the request.

        Args:
            prompt: what is answered.
            sampling_params: vLLM's ``SamplingParams``; None for its defaults.
            options: this request's blending: the names of ``BlendConfig.for_request``, or ``ingest``.
            extra: passed on to vLLM's ``generate``, such as ``priority``.

        Raises:
            PromptTooLong: the prompt leaves no room in the context.
            ConfigError: a value that can't be used.
        """

    @abstractmethod
    async def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of the workers (``flush``, ``prefetch``, ``forget``, ``account``); one result a rank."""

    @abstractmethod
    async def reset_prefix_cache(self) -> bool:
        """Empty vLLM's own prefix cache, for measuring; False where a request still uses a part of it."""

    @abstractmethod
    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the engine's loop and wait for it."""

    @abstractmethod
    def close(self) -> None:
        """Stop the engine and free its memory; a second call does nothing."""


__all__ = ["Engine", "EngineInfo", "Prompt", "Watched"]
