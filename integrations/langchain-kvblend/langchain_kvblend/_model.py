"""EngineModel: what the chat model and the plain language model have in common: engine, sampling, identity."""

from __future__ import annotations

import difflib
import threading
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator, Mapping
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any, Self, TypeVar

from langchain_core.documents import Document
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, PrivateAttr, SecretStr, model_validator

from kvblend_rag.chat import Chat
from kvblend_rag.config import BlendConfig
from kvblend_rag.conversation.turn import ChatDelta, ChatResult
from kvblend_rag.documents import DocumentUse, which_found
from kvblend_rag.errors import ConfigError, RequestTimeout
from kvblend_rag.kvblend import KVBlend
from kvblend_rag.report import BlendReport
from kvblend_rag.shared import release_handle, shared_handle
from langchain_kvblend._documents import DocumentText, text_of

T = TypeVar("T")

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "max_tokens",
    "n",
    "logprobs",
    "top_logprobs",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
_ALIASES = {"max_completion_tokens": "max_tokens", "stop_sequences": "stop", "model_kwargs": "extra"}
_OF_HOSTED_MODELS = frozenset({"model_provider", "organization"})
"""Standard arguments of LangChain's models that mean nothing here: passed over."""
_OF_LANGCHAIN = frozenset({"ls_structured_output_format", "stream", "structured_output_format"})
_REMEMBERED = 256


class EngineModel(BaseModel):
    """An engine, and how its answers are drawn. The engine starts with the first request.

    Models of one configuration share one engine.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True, protected_namespaces=())

    model: str = Field(default="", validation_alias=AliasChoices("model", "model_name"))
    """Folder or hub name of the model; may stand in the configuration file instead."""

    kv: KVBlend | None = Field(default=None, exclude=True, repr=False)
    """Engine and store to use, instead of ``model`` and the three below."""

    base_url: str | None = Field(default=None, validation_alias=AliasChoices("base_url", "openai_api_base"))
    """Address of a server started by ``kvblend serve``, as ``http://host:8000/v1``; no engine is started here then, and
    ``model`` is the name it serves."""

    api_key: SecretStr | None = Field(default=None, exclude=True, repr=False)
    """Of that server; ``KVBLEND_API_KEY`` or ``OPENAI_API_KEY`` when not given."""

    config_file: str | Path | None = None
    """A kvblend YAML file; ``KVBLEND_CONFIG_FILE`` when not given."""

    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of kvblend (``BlendConfig``), such as ``store_path`` or ``recompute_ratio``."""

    engine_args: dict[str, Any] = Field(default_factory=dict)
    """vLLM's engine arguments, such as ``max_model_len``."""

    temperature: float | None = None
    """As the five below: None leaves it to the model's own generation configuration."""
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None

    seed: int | None = None
    stop: list[str] | None = Field(default=None, validation_alias=AliasChoices("stop", "stop_sequences"))
    """Texts that end the answer; they are not part of it."""

    max_tokens: int | None = Field(default=None, validation_alias=AliasChoices("max_tokens", "max_completion_tokens"))
    """Longest answer, in tokens; None: what the context has room for."""

    n: int = 1
    """Answers drawn from one prompt."""

    logprobs: bool = False
    """Give the log-probability of each token."""

    top_logprobs: int = 0
    """Alternatives given for each token."""

    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Any other of vLLM's ``SamplingParams``."""

    blend: dict[str, Any] = Field(default_factory=dict)
    """How requests are blended: ``blend`` (false: not at all), ``selector``, ``ratio``, ``span``, ``tenant``."""

    timeout: float | None = Field(default=None, validation_alias=AliasChoices("timeout", "request_timeout"))
    """Seconds a request may take; None for no bound."""

    max_retries: int = 0
    """How often a request is asked again that ran out of time before anything of it was seen."""

    _config: BlendConfig = PrivateAttr()
    _lock: threading.RLock = PrivateAttr(default_factory=threading.RLock)
    _own: KVBlend | None = PrivateAttr(default=None)
    _made: tuple[Chat, tuple[KVBlend, dict[str, Any]]] | None = PrivateAttr(default=None)
    _prompts: OrderedDict[str, tuple[BlendReport, tuple[int, ...]]] = PrivateAttr(default_factory=OrderedDict)

    @model_validator(mode="before")
    @classmethod
    def _known_names(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        given = {name: value for name, value in values.items() if name not in _OF_HOSTED_MODELS}
        known = [
            *cls.model_fields,
            "model_name",
            "openai_api_base",
            "max_completion_tokens",
            "request_timeout",
            "stop_sequences",
        ]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"Did you mean {near[0]!r}?" if near else "Put vLLM's own arguments into engine_args."
                raise ConfigError(f"{cls.__name__} has no argument {name!r}. {hint}")
        if isinstance(given.get("stop"), str):
            given["stop"] = [given["stop"]]
        if isinstance(given.get("model"), Path):
            given["model"] = str(given["model"])
        return given

    @model_validator(mode="after")
    def _configured(self) -> Self:
        if self.kv is not None:
            # An engine without a model's name in its configuration was handed over and runs already.
            own = self.kv.config.model or self.kv.engine.info.model
            others = (self.config_file, self.settings, self.engine_args, self.base_url)
            if any(others) or self.model not in ("", own):
                raise ConfigError("Give kv, or model with its settings: a KVBlend has its configuration already.")
            self._config, self.model = self.kv.config, own
            return self
        settings = dict(self.settings)
        if self.model:
            settings["model"] = self.model
        if self.base_url:
            settings["base_url"] = self.base_url
        if self.engine_args:
            settings["engine_args"] = self.engine_args
        self._config = BlendConfig.load(self.config_file, **settings)
        if not self._config.model:
            raise ConfigError(f"Which model? {type(self).__name__}(model=…), or `model:` in the configuration file.")
        self.model = self._config.model
        return self

    @property
    def handle(self) -> KVBlend:
        """The engine and store in use; nothing is started by asking."""
        if self.kv is not None:
            return self.kv
        with self._lock:
            if self._own is None:
                key = self.api_key.get_secret_value() if self.api_key is not None else ""
                self._own = shared_handle(self._config, key)
            return self._own

    def close(self) -> None:
        """This model needs its engine no longer; it stops when no other model of the configuration needs it.

        A ``kv`` that was given is left alone. A later request starts the engine anew.
        """
        with self._lock:
            own, self._own = self._own, None
            self._prompts.clear()
        if own is not None:
            release_handle(own)

    def found_documents(
        self, response: Any, documents: list[Document], document_prompt: DocumentText | None = None
    ) -> list[DocumentUse]:
        """Which retrieved documents stood in the prompt of a response, and why the others did not.

        Args:
            response: a message of this model, the aggregate of a stream, or its ``response_metadata``.
            documents: what was retrieved.
            document_prompt: how the chain formats a document; None: the page's content alone.

        Raises:
            ConfigError: the response is not one of the last 256 of this model.
        """
        metadata = response if isinstance(response, Mapping) else getattr(response, "response_metadata", {})
        request_id = metadata.get("blend_report", {}).get("request_id")
        if request_id not in self._prompts:
            raise ConfigError(f"This is none of the last {_REMEMBERED} responses of this model.")
        report, prompt = self._prompts[request_id]
        texts = [text_of(document, document_prompt) for document in documents]
        return which_found(self.handle, report, texts, prompt)

    def _chat_settings(self) -> dict[str, Any]:
        """Arguments of ``Chat``, beside the handle."""
        return {}

    @property
    def _chat(self) -> Chat:
        with self._lock:
            wanted = (self.handle, self._chat_settings())
            if self._made is None or self._made[1] != wanted:
                self._made = (Chat(wanted[0], **wanted[1]), wanted)
            return self._made[0]

    def _remember(self, answer: ChatResult | ChatDelta) -> None:
        if answer.report is None:
            return
        with self._lock:
            self._prompts[answer.report.request_id] = (answer.report, tuple(answer.prompt_token_ids or ()))
            while len(self._prompts) > _REMEMBERED:
                self._prompts.popitem(last=False)

    @property
    def _identity(self) -> dict[str, Any]:
        """All that changes an answer. In groups, because LangChain lays a call's arguments over these names, also
        where a call only adds to what the model has."""
        settings = self._config.to_dict()
        if self.kv is not None and not self._config.model:
            info = self.kv.engine.info
            settings |= {"fingerprint": info.fingerprint, "dtype": info.dtype, "engine": info.version}
        return {
            "model": self.model,
            "settings": settings,
            "sampling": {name: getattr(self, name) for name in (*_SAMPLING, "model_kwargs")},
            "request": {name: getattr(self, name) for name in self._request_fields()},
        }

    @classmethod
    def _request_fields(cls) -> tuple[str, ...]:
        """Fields, beside those of sampling, that change an answer."""
        return ("blend",)

    def _options(self, stop: list[str] | None, given: Mapping[str, Any]) -> dict[str, Any]:
        """What ``Chat`` takes, of the model's fields and one call's arguments; the sampling settings among them.

        Raises:
            ConfigError: the call names another model.
        """
        given = {_ALIASES.get(name, name): value for name, value in given.items() if name not in _OF_LANGCHAIN}
        other = given.pop("model", None)
        if other is not None and other != self.model:
            raise ConfigError(f"This engine runs {self.model}; for {other} make another {type(self).__name__}.")
        sampling = {name: getattr(self, name) for name in _SAMPLING} | {"extra": dict(self.model_kwargs)}
        options: dict[str, Any] = {
            "blend": {**self.blend, **(given.pop("blend", None) or {})},
            "timeout": given.pop("timeout", self.timeout),
        }
        for name in self._call_options():
            if name in given:
                options[name] = given.pop(name)
        sampling |= given
        if stop is not None:
            sampling["stop"] = stop
        if sampling.get("top_logprobs"):
            sampling["logprobs"] = True
        return {**options, "sampling": sampling}

    @classmethod
    def _call_options(cls) -> tuple[str, ...]:
        """Names, beside those of sampling, that ``Chat`` takes with a call."""
        return ()

    def _retries(self, given: dict[str, Any]) -> int:
        retries = given.pop("max_retries", None)
        return self.max_retries if retries is None else int(retries)


def one_answer(options: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` unless the options ask for a single answer."""
    if options["sampling"].get("n") not in (None, 1):
        raise ConfigError("A stream is of one answer: n must be 1.")


def again(work: Callable[[], T], retries: int) -> T:
    """What ``work`` returns, tried again when it runs out of time."""
    while True:
        try:
            return work()
        except RequestTimeout:
            if retries <= 0:
                raise
            retries -= 1


async def again_async(work: Callable[[], Awaitable[T]], retries: int) -> T:
    """``again`` for coroutines."""
    while True:
        try:
            return await work()
        except RequestTimeout:
            if retries <= 0:
                raise
            retries -= 1


def stream_again(start: Callable[[], Iterator[T]], retries: int) -> Generator[T, None, None]:
    """What ``start`` yields; begun again when it runs out of time before the first of it."""
    while True:
        begun = False
        try:
            with closing(start()) as stream:  # type: ignore[type-var]
                for each in stream:
                    begun = True
                    yield each
            return
        except RequestTimeout:
            if begun or retries <= 0:
                raise
            retries -= 1


async def stream_again_async(start: Callable[[], AsyncGenerator[T, None]], retries: int) -> AsyncGenerator[T, None]:
    """``stream_again`` for asynchronous iterators; leaving it closes what it iterates at once."""
    while True:
        begun = False
        try:
            async with aclosing(start()) as stream:
                async for each in stream:
                    begun = True
                    yield each
            return
        except RequestTimeout:
            if begun or retries <= 0:
                raise
            retries -= 1


__all__ = ["EngineModel", "again", "again_async", "one_answer", "stream_again", "stream_again_async"]
