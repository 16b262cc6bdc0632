"""ChatKVBlend: a chat model inside this process, over vLLM, that blends stored chunks into its prompts."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, Literal, Self, cast

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput, ModelProfile
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig, RunnableMap, RunnablePassthrough
from langchain_core.runnables.config import get_config_list
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import TypeBaseModel, is_basemodel_subclass
from pydantic import BaseModel, Field, model_validator

from kvblend_rag.conversation.profile import profile_of
from kvblend_rag.conversation.turn import ChatDelta
from kvblend_rag.conversation.turn import ChatResult as Answer
from kvblend_rag.errors import ConfigError
from langchain_kvblend._forms import WholeCall, WholeJson, WholePydantic, WholePydanticCall
from langchain_kvblend._messages import PROVIDER, as_chunk, as_message, as_openai, response_metadata
from langchain_kvblend._model import EngineModel, again, again_async, one_answer, stream_again, stream_again_async

_AT_ONCE = 256
"""Requests of one ``batch`` in flight: as many as vLLM computes together."""


class ChatKVBlend(EngineModel, BaseChatModel):
    """A chat model that runs here, in vLLM, and reuses the stored KV of the chunks in its prompts.

    The engine starts with the first request, or when ``profile`` is read of a model that is no local folder. Models
    of one configuration share one engine; ``close`` gives it up.

    Every answer says in ``usage_metadata`` how many input tokens needed no computing (``cache_read``), and in
    ``response_metadata["blend_report"]`` what became of each part of the prompt.

    Example:
        .. code-block:: python

            llm = ChatKVBlend(model="Qwen/Qwen3-8B", temperature=0)
            llm.invoke("Hello!")
    """

    tool_parser: str | None = None
    """vLLM's name of the parser of tool calls; None: chosen from the chat template."""

    reasoning_parser: str | None = None
    """vLLM's name of the parser of reasoning; None: chosen; empty: none."""

    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed on to the chat template, such as ``{"enable_thinking": False}``."""

    parallel_tool_calls: bool = True
    """False: at most one tool call an answer. Small models that must call a tool may not stop otherwise."""

    streaming: bool = False
    """Whether ``invoke`` streams too, for callbacks that want each token."""

    @model_validator(mode="after")
    def _profile_when_asked(self) -> Self:
        # It may take the engine to know, and making a model must not start it: see __getattr__.
        if self.profile is None:
            del self.__dict__["profile"]
        return self

    def __getattr__(self, name: str) -> Any:
        if name != "profile":
            return super().__getattr__(name)  # type: ignore[misc]
        known = (None if self.handle.started else profile_of(self._config)) or self._chat.profile
        self.__dict__["profile"] = ModelProfile(
            name=self.model,
            max_input_tokens=known.max_input_tokens,
            tool_calling=known.tool_calling,
            tool_choice=known.tool_calling,
            tool_call_streaming=known.tool_calling,
            structured_output=known.structured_output,
            reasoning_output=known.reasoning_output,
            text_inputs=True,
            text_outputs=True,
            image_inputs=False,
            audio_inputs=False,
            video_inputs=False,
        )
        return self.__dict__["profile"]

    # What LangChain asks a model for

    @property
    def _llm_type(self) -> str:
        return "chat-kvblend"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return self._identity

    @classmethod
    def _request_fields(cls) -> tuple[str, ...]:
        own = ("tool_parser", "reasoning_parser", "chat_template_kwargs", "parallel_tool_calls", "output_version")
        return (*super()._request_fields(), *own)

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop or self.stop, **kwargs)
        return LangSmithParams(**{**params, "ls_provider": PROVIDER})

    def _chat_settings(self) -> dict[str, Any]:
        return {"tool_parser": self.tool_parser, "reasoning_parser": self.reasoning_parser}

    @classmethod
    def _call_options(cls) -> tuple[str, ...]:
        return ("tools", "tool_choice", "parallel_tool_calls", "template")

    def _turn(self, stop: list[str] | None, given: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        given = dict(given)
        given["template"] = {**self.chat_template_kwargs, **(given.pop("chat_template_kwargs", None) or {})}
        if given.get("tools") is None:
            given.pop("tools", None)
        if given.get("parallel_tool_calls") is None:
            given["parallel_tool_calls"] = self.parallel_tool_calls
        return self._retries(given), self._options(stop, given)

    # Answers

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        retries, options = self._turn(stop, kwargs)
        plain = as_openai(messages)
        return self._result(again(lambda: self._chat.complete_sync(plain, **options), retries))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        retries, options = self._turn(stop, kwargs)
        plain = as_openai(messages)
        return self._result(await again_async(lambda: self._chat.complete(plain, **options), retries))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        retries, options = self._turn(stop, kwargs)
        one_answer(options)
        plain = as_openai(messages)
        with contextlib.closing(stream_again(lambda: self._chat.stream_sync(plain, **options), retries)) as deltas:
            for delta in deltas:
                chunk = self._chunk(delta)
                if chunk is not None:
                    if run_manager:
                        run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        retries, options = self._turn(stop, kwargs)
        one_answer(options)
        plain = as_openai(messages)
        deltas = stream_again_async(lambda: self._chat.stream(plain, **options), retries)
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                chunk = self._chunk(delta)
                if chunk is not None:
                    if run_manager:
                        await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """All inputs in one batch of the engine, unless ``max_concurrency`` says otherwise."""
        configs = _all_at_once(config, len(inputs))
        return super().batch(inputs, configs, return_exceptions=return_exceptions, **kwargs)

    def batch_as_completed(  # type: ignore[override]
        self,
        inputs: Sequence[LanguageModelInput],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> Iterator[tuple[int, AIMessage | Exception]]:
        """As ``batch``, answers in the order they are finished."""
        configs = _all_at_once(config, len(inputs))
        yield from super().batch_as_completed(  # type: ignore[call-overload]
            inputs, configs, return_exceptions=return_exceptions, **kwargs
        )

    def _result(self, answer: Answer) -> ChatResult:
        self._remember(answer)
        metadata = response_metadata(answer, self.model)
        return ChatResult(
            generations=[
                ChatGeneration(
                    message=as_message(each, metadata, None if place else answer.usage),
                    generation_info={"finish_reason": each.finish_reason},
                )
                for place, each in enumerate(answer.generations)
            ]
        )

    def _chunk(self, delta: ChatDelta) -> ChatGenerationChunk | None:
        self._remember(delta)
        last = response_metadata(delta, self.model) if delta.usage is not None else {}
        message = as_chunk(delta, last)
        return None if message is None else ChatGenerationChunk(message=message)

    # Tokens

    def get_token_ids(self, text: str) -> list[int]:
        """Token ids of a text, by the model's own tokenizer; starts the engine."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return self._chat.token_ids(text)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Tokens of a conversation as the chat template writes it, tools included; starts the engine."""
        described = [convert_to_openai_tool(tool) for tool in tools or ()]
        return len(self.handle.engine.render(as_openai(messages), described, **self.chat_template_kwargs))

    # Tools and forms

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: dict[str, Any] | str | bool | None = None,
        strict: bool | None = None,
        parallel_tool_calls: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """A model that may call tools.

        Args:
            tools: functions, Pydantic or TypedDict classes, LangChain tools, or OpenAI's dictionaries.
            tool_choice: ``auto`` (the default), ``none``, ``any`` or ``required`` or True, or a tool's name. Any
                and a name constrain the answer to the tools' schemas.
            strict: written into the tools' schemas.
            parallel_tool_calls: False: at most one call.
            kwargs: bound too.
        """
        described = [convert_to_openai_tool(tool, strict=strict) for tool in tools]
        if tool_choice is True:
            tool_choice = "any"
        if tool_choice:
            kwargs["tool_choice"] = tool_choice
        if parallel_tool_calls is not None:
            kwargs["parallel_tool_calls"] = parallel_tool_calls
        return self.bind(tools=described, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: Literal["json_schema", "function_calling", "json_mode"] = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
        """A model whose answers have a form.

        Args:
            schema: a Pydantic or TypedDict class, a JSON schema, or OpenAI's function dictionary; may be left out
                with ``json_mode``.
            method: ``json_schema``: the engine can write nothing else. ``function_calling``: as the arguments of
                a tool it must call. ``json_mode``: any JSON object, whose keys the prompt must ask for.
            include_raw: return ``raw``, ``parsed`` and ``parsing_error``.
            strict: written into a tool's schema; the form is always kept.
            kwargs: bound too.

        Answers that ``max_tokens`` cut raise ``OutputParserException`` (or stand in ``parsing_error``).

        Raises:
            ConfigError: an unknown method, or no schema.
        """
        if schema is None and method != "json_mode":
            raise ConfigError(f"with_structured_output needs a schema with method {method!r}.")
        bound: Runnable[LanguageModelInput, AIMessage]
        parser: Any
        seen = {"kwargs": {"method": method, "strict": strict}, "schema": schema}
        if method == "function_calling":
            described = convert_to_openai_tool(cast("Any", schema), strict=strict)
            name = described["function"]["name"]
            bound = self.bind_tools(
                [cast("Any", schema)],
                tool_choice=name,
                strict=strict,
                parallel_tool_calls=False,
                ls_structured_output_format=seen,
                **kwargs,
            )
            if _is_pydantic(schema):
                parser = WholePydanticCall(tools=[cast("TypeBaseModel", schema)], first_tool_only=True)
            else:
                parser = WholeCall(key_name=name, first_tool_only=True)
        elif method in ("json_schema", "json_mode"):
            form: dict[str, Any] = {"type": "json_object"}
            if method == "json_schema":
                name, described = _json_schema(cast("Any", schema))
                form = {"type": "json_schema", "json_schema": {"name": name, "schema": described}}
            if schema is not None:
                kwargs["ls_structured_output_format"] = seen
            bound = self.bind(response_format=form, **kwargs)
            parser = WholePydantic(pydantic_object=cast("Any", schema)) if _is_pydantic(schema) else None
            parser = parser or WholeJson()
        else:
            raise ConfigError(f"method is {method!r}, and must be json_schema, function_calling or json_mode.")
        if not include_raw:
            return cast("Runnable[LanguageModelInput, dict[str, Any] | BaseModel]", bound | parser)
        parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
        failed = RunnablePassthrough.assign(parsed=lambda _: None)
        return RunnableMap(raw=bound) | parsed.with_fallbacks([failed], exception_key="parsing_error")


def _is_pydantic(schema: Any) -> bool:
    return isinstance(schema, type) and is_basemodel_subclass(schema)


def _json_schema(schema: dict[str, Any] | type) -> tuple[str, dict[str, Any]]:
    """A schema's name and itself. Pydantic's own keeps references and bounds; a JSON schema stays as it is."""
    if _is_pydantic(schema):
        kind: Any = schema
        own = kind.model_json_schema() if hasattr(kind, "model_json_schema") else kind.schema()
        return str(own.get("title", "answer")), own
    if isinstance(schema, Mapping) and schema.get("type") != "function" and {"type", "properties", "$ref"} & {*schema}:
        return str(schema.get("title", "answer")), dict(schema)
    described = convert_to_json_schema(cast("Any", schema))
    return str(described["title"]), described


def _all_at_once(config: Any, count: int) -> list[RunnableConfig]:
    configs = get_config_list(config, count) if count else []
    at_once = min(count, _AT_ONCE)
    return [each if each.get("max_concurrency") else {**each, "max_concurrency": at_once} for each in configs]


__all__ = ["ChatKVBlend"]
