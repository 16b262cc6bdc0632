"""KVBlendLLM: LlamaIndex's LLM over a KVBlend."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any, TypeVar, cast

from llama_index.core.base.llms.generic_utils import messages_to_prompt as generic_messages_to_prompt
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.bridge.pydantic import BaseModel, Field, PrivateAttr
from llama_index.core.constants import DEFAULT_NUM_OUTPUTS
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection, default_completion_to_prompt
from llama_index.core.program.utils import get_program_for_llm
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools.types import BaseTool
from llama_index.core.types import BasePydanticProgram, PydanticProgramMode
from llama_index.llms.kvblend.messages import Answer, as_conversation, openai_tools, tool_selections

from kvblend_rag.chat import Chat
from kvblend_rag.config import BlendConfig
from kvblend_rag.conversation.turn import ChatDelta
from kvblend_rag.errors import ConfigError
from kvblend_rag.kvblend import KVBlend
from kvblend_rag.shared import release_handle, shared_handle

R = TypeVar("R", ChatResponse, CompletionResponse)

_OWN_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "stop", "max_tokens")
_OF_A_TURN = ("tools", "tool_choice", "parallel_tool_calls", "template", "blend", "timeout")
_OF_A_TEXT = ("blend", "timeout")


class KVBlendLLM(FunctionCallingLLM):
    """A model in vLLM that reuses the precomputed KV of the chunks in its prompts.

    The engine starts with the first request (or the first look at ``metadata``); models of one configuration share
    it. Each response's ``additional_kwargs`` count its tokens, ``raw["report"]`` is its ``BlendReport``.

    Args:
        model: folder or hub name of the model.
        kv: engine and store; instead of ``model`` and the five below.
        base_url: address of a server started by ``kvblend serve``, as ``http://host:8000/v1``; no engine is started
            here then, and ``model`` is the name it serves.
        api_key: of that server; ``KVBLEND_API_KEY`` or ``OPENAI_API_KEY`` when not given.
        config_file: a kvblend YAML file; ``KVBLEND_CONFIG_FILE`` when not given.
        settings: settings of kvblend (``BlendConfig``), such as ``store_path``.
        engine_args: vLLM's engine arguments, such as ``max_model_len``.
        fields: the fields below, and LlamaIndex's: ``system_prompt``, ``messages_to_prompt``,
            ``completion_to_prompt``, ``callback_manager``…

    Examples:
        >>> llm = KVBlendLLM(model="/models/smollm2", temperature=0)
        >>> llm.complete("Hello").text
    """

    model: str = Field(default="", description="Folder or hub name of the model.")
    temperature: float | None = Field(default=None, ge=0.0, description="None: the model's own default.")
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: list[str] | None = Field(default=None, description="Texts that end an answer.")
    max_tokens: int | None = Field(default=None, gt=0, description="Longest answer; None: what the context holds.")
    additional_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Further settings of kvblend_rag.Sampling; other vLLM ones in `extra`.",
    )
    blend: dict[str, Any] = Field(
        default_factory=dict, description="Blending of all requests: `blend`, `selector`, `ratio`, `span`."
    )
    template: dict[str, Any] = Field(default_factory=dict, description="Passed on to the chat template.")
    tool_parser: str | None = Field(default=None, description="vLLM's parser of tool calls; None: by the template.")
    reasoning_parser: str | None = Field(default=None, description="vLLM's parser of reasoning; empty: none.")
    timeout: float | None = Field(default=None, description="Seconds a request may take.")
    function_calling: bool | None = Field(
        default=None, description="Whether agents and structured prediction call tools; None: what the model can."
    )

    _kv: KVBlend | None = PrivateAttr(default=None)
    _chat: tuple[tuple[str | None, str | None, float | None], Chat] | None = PrivateAttr(default=None)
    _config: BlendConfig | None = PrivateAttr(default=None)
    _api_key: str = PrivateAttr(default="")

    def __init__(
        self,
        model: str | None = None,
        *,
        kv: KVBlend | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        config_file: str | Path | None = None,
        settings: Mapping[str, Any] | None = None,
        engine_args: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        if isinstance(fields.get("stop"), str):
            fields["stop"] = [fields["stop"]]
        given = {
            "model": model,
            "base_url": base_url,
            **(settings or {}),
            "engine_args": engine_args and dict(engine_args),
        }
        given = {name: value for name, value in given.items() if value is not None}
        if kv is None:
            config = BlendConfig.load(config_file, **given)
            if not config.model:
                raise ConfigError("Which model? Give model=…, kv=…, or a configuration that names one.")
        elif given or config_file is not None:
            raise ConfigError("Give either kv, or model, base_url, config_file, settings and engine_args.")
        else:
            config = kv.config
        super().__init__(model=config.model, **fields)
        self._config, self._kv, self._api_key = config, kv, api_key or ""

    @classmethod
    def class_name(cls) -> str:
        """See ``BaseComponent``."""
        return "KVBlendLLM"

    @property
    def kv(self) -> KVBlend:
        """Engine and store, shared with other models of this configuration; does not start the engine."""
        if self._kv is None:
            assert self._config is not None
            self._kv = shared_handle(self._config, self._api_key)
        return self._kv

    def close(self) -> None:
        """Let go of a shared engine; the last model's call stops it. A given ``kv`` is left alone."""
        if self._kv is not None and release_handle(self._kv):
            self._kv = self._chat = None

    @property
    def metadata(self) -> LLMMetadata:
        """What the model can do; starts the engine."""
        profile = self._chats.profile
        can_call = profile.tool_calling if self.function_calling is None else self.function_calling
        return LLMMetadata(
            context_window=profile.max_input_tokens,
            num_output=self.max_tokens or DEFAULT_NUM_OUTPUTS,
            is_chat_model=self._has_template or self._own_messages,
            is_function_calling_model=can_call,
            model_name=self._name,
        )

    def to_payload(self) -> dict[str, Any]:
        """For instrumentation events; unlike ``metadata`` it does not wait for the engine."""
        sampling = {name: getattr(self, name) for name in _OWN_SAMPLING}
        return {
            "class_name": self.class_name(),
            "model_name": self._name,
            **{name: value for name, value in sampling.items() if value is not None},
        }

    @property
    def tokenizer(self) -> Callable[[str], list[int]]:
        """The model's own tokenizer, for ``Settings.tokenizer``: LlamaIndex counts with another one."""
        return self._chats.token_ids

    # Chat

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation.

        Args:
            messages: the conversation.
            kwargs: sampling settings, ``response_format``, ``tools``, ``tool_choice``, ``parallel_tool_calls``,
                ``template``, ``blend`` and ``timeout`` of this request.
        """
        text = self._as_text(messages, kwargs)
        if text is None:
            result = self._chats.complete_sync(as_conversation(messages), **self._options(kwargs, _OF_A_TURN))
        else:
            result = self._chats.complete_text_sync(text, **self._options(kwargs, _OF_A_TEXT))
        return Answer.of(self._name, result).chat()

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """``chat``, as it comes; closing the generator aborts the request."""
        text = self._as_text(messages, kwargs)
        if text is None:
            deltas = self._chats.stream_sync(as_conversation(messages), **self._options(kwargs, _OF_A_TURN))
        else:
            deltas = self._chats.stream_text_sync(text, **self._options(kwargs, _OF_A_TEXT))
        return _growing(self._name, deltas, Answer.chat)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """See ``chat``."""
        text = await asyncio.to_thread(self._as_text, messages, kwargs)
        if text is None:
            result = await self._chats.complete(as_conversation(messages), **self._options(kwargs, _OF_A_TURN))
        else:
            result = await self._chats.complete_text(text, **self._options(kwargs, _OF_A_TEXT))
        return Answer.of(self._name, result).chat()

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """See ``stream_chat``."""
        text = await asyncio.to_thread(self._as_text, messages, kwargs)
        if text is None:
            deltas = self._chats.stream(as_conversation(messages), **self._options(kwargs, _OF_A_TURN))
        else:
            deltas = self._chats.stream_text(text, **self._options(kwargs, _OF_A_TEXT))
        return _agrowing(self._name, deltas, Answer.chat)

    # Completion

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt.

        Args:
            prompt: the text; it becomes a user's message in the model's chat template, unless
                ``completion_to_prompt`` was given or the model has no template.
            formatted: continue the text as it stands.
            kwargs: as for ``chat``.
        """
        text = self._as_formatted(prompt, formatted)
        if text is None:
            result = self._chats.complete_sync(_user(prompt), **self._options(kwargs, _OF_A_TURN))
        else:
            result = self._chats.complete_text_sync(text, **self._options(kwargs, _OF_A_TEXT))
        return Answer.of(self._name, result).completion()

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """``complete``, as it comes; closing the generator aborts the request."""
        text = self._as_formatted(prompt, formatted)
        if text is None:
            deltas = self._chats.stream_sync(_user(prompt), **self._options(kwargs, _OF_A_TURN))
        else:
            deltas = self._chats.stream_text_sync(text, **self._options(kwargs, _OF_A_TEXT))
        return _growing(self._name, deltas, Answer.completion)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """See ``complete``."""
        text = await asyncio.to_thread(self._as_formatted, prompt, formatted)
        if text is None:
            result = await self._chats.complete(_user(prompt), **self._options(kwargs, _OF_A_TURN))
        else:
            result = await self._chats.complete_text(text, **self._options(kwargs, _OF_A_TEXT))
        return Answer.of(self._name, result).completion()

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """See ``stream_complete``."""
        text = await asyncio.to_thread(self._as_formatted, prompt, formatted)
        if text is None:
            deltas = self._chats.stream(_user(prompt), **self._options(kwargs, _OF_A_TURN))
        else:
            deltas = self._chats.stream_text(text, **self._options(kwargs, _OF_A_TEXT))
        return _agrowing(self._name, deltas, Answer.completion)

    # Tools

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: str | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of ``chat`` for a turn with tools."""
        messages = list(chat_history or ())
        if user_msg is not None:
            messages.append(
                ChatMessage(role=MessageRole.USER, content=user_msg) if isinstance(user_msg, str) else user_msg
            )
        return {
            "messages": messages,
            "tools": openai_tools(tools),
            "tool_choice": (tool_choice or ("required" if tool_required else "auto")) if tools else None,
            "parallel_tool_calls": allow_parallel_tool_calls,
            **kwargs,
        }

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The tools a response calls; of one still streaming, what is known of their arguments.

        Raises:
            ValueError: it calls none, and ``error_on_no_tool_call`` is set.
        """
        selected = tool_selections(response)
        if not selected and error_on_no_tool_call:
            raise ValueError(f"Expected at least one tool call, but the answer is: {response.message.content!r}")
        return selected

    def _structured_stream_call(
        self,
        output_cls: type[BaseModel],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Any:
        program = self._streaming_program(output_cls, prompt)
        return program.stream_call(llm_kwargs=llm_kwargs, **prompt_args)

    async def _structured_astream_call(
        self,
        output_cls: type[BaseModel],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Any:
        program = self._streaming_program(output_cls, prompt)
        return await program.astream_call(llm_kwargs=llm_kwargs, **prompt_args)

    def _streaming_program(self, output_cls: type[BaseModel], prompt: PromptTemplate) -> BasePydanticProgram[Any]:
        """LlamaIndex requires the tool's call when it does not stream, and forgets to when it does."""
        calls = self.metadata.is_function_calling_model and self.pydantic_program_mode in (
            PydanticProgramMode.DEFAULT,
            PydanticProgramMode.FUNCTION,
        )
        forced = {"tool_choice": "required"} if calls else {}
        return get_program_for_llm(output_cls, prompt, self, self.pydantic_program_mode, **forced)

    @property
    def _chats(self) -> Chat:
        settings = (self.tool_parser, self.reasoning_parser, self.timeout)
        if self._chat is None or self._chat[0] != settings:  # fields can be set, and copies made with others
            tool_parser, reasoning_parser, timeout = settings
            chat = Chat(self.kv, tool_parser=tool_parser, reasoning_parser=reasoning_parser, timeout=timeout)
            self._chat = (settings, chat)
        return self._chat[1]

    @property
    def _name(self) -> str:
        return self.model or "kvblend"

    @property
    def _has_template(self) -> bool:
        return bool(self.kv.engine.template.source)

    @property
    def _own_messages(self) -> bool:
        return self.messages_to_prompt is not generic_messages_to_prompt

    def _as_text(self, messages: Sequence[ChatMessage], options: Mapping[str, Any]) -> str | None:
        """The prompt, where it is not for the chat template to make."""
        if not options.get("tools") and (self._own_messages or not self._has_template):
            return cast(Callable[..., str], self.messages_to_prompt)(messages)
        return None

    def _as_formatted(self, prompt: str, formatted: bool) -> str | None:
        if formatted:
            return prompt
        if self.completion_to_prompt is not default_completion_to_prompt or not self._has_template:
            return cast(Callable[..., str], self.completion_to_prompt)(prompt)
        return None

    def _options(self, given: Mapping[str, Any], allowed: Sequence[str]) -> dict[str, Any]:
        """A request's arguments for the core, of the model's settings and its own."""
        own = {name: getattr(self, name) for name in _OWN_SAMPLING}
        drawn = {name: value for name, value in given.items() if name not in _OF_A_TURN and value is not None}
        sampling = {**self.additional_kwargs, **{n: v for n, v in own.items() if v is not None}, **drawn}
        if sampling.get("n", 1) != 1:
            raise ConfigError("LlamaIndex takes one answer a request: leave n out.")
        options = {name: given[name] for name in allowed if given.get(name) is not None}
        options["blend"] = {**self.blend, **(given.get("blend") or {})}
        if "template" in allowed:
            options["template"] = {**self.template, **(given.get("template") or {})}
        return {**options, "sampling": sampling}


def _user(prompt: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}]


def _growing(
    model: str, deltas: Iterator[ChatDelta], form: Callable[[Answer, ChatDelta], R]
) -> Generator[R, None, None]:
    answer = Answer(model)
    with closing(cast(Any, deltas)):
        for delta in deltas:
            answer.add(delta)
            yield form(answer, delta)


async def _agrowing(
    model: str, deltas: AsyncIterator[ChatDelta], form: Callable[[Answer, ChatDelta], R]
) -> AsyncGenerator[R, None]:
    answer = Answer(model)
    async with aclosing(cast(Any, deltas)):
        async for delta in deltas:
            answer.add(delta)
            yield form(answer, delta)


__all__ = ["KVBlendLLM"]
