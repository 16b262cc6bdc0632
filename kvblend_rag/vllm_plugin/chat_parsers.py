"""ParsedTurn: a conversation rendered for a model, and its output read by vLLM's own parsers, as vLLM's server does.

Forced tool calls are constrained by the parser itself (``adjust_request``): to the model's native call syntax
where xgrammar knows it, else to a JSON array of ``{name, parameters}``, or to the arguments of the named tool.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from vllm.parser import Parser, ParserManager
from vllm.reasoning import ReasoningParserManager
from vllm.sampling_params import StructuredOutputsParams
from vllm.tool_parsers import ToolParserManager

from kvblend_rag.conversation import dialect
from kvblend_rag.conversation.sampling import Sampling
from kvblend_rag.conversation.template import ESCAPED, ChatTemplate
from kvblend_rag.conversation.turn import ChatRequest, Parsed, ToolCallDelta, Turn
from kvblend_rag.errors import ConfigError
from kvblend_rag.vllm_plugin import compat


class ParsedTurn(Turn):
    """A turn with one parser for each of its answers.

    Args:
        request: the conversation.
        tokenizer: the model's.
        template: the chat template of this tokenizer.
        architectures: as the model's configuration names them.
        model_config: vLLM's; None where no vLLM runs.
        reasons_first: the engine leaves reasoning unconstrained (vLLM's argument ``reasoning_parser``).

    Raises:
        ConfigError: a message, tool or parser that can't be used.
    """

    def __init__(
        self,
        request: ChatRequest,
        tokenizer: Any,
        template: ChatTemplate,
        architectures: Sequence[str] = (),
        model_config: Any = None,
        reasons_first: bool = False,
    ) -> None:
        choice = request.choice()
        tools = [] if choice == "none" else [dict(tool) for tool in request.tools]
        tool_name = None
        if tools:
            tool_name = request.tool_parser or dialect.tool_parser(template.source, architectures)
        reasoning = request.reasoning_parser
        if reasoning is None:
            reasoning = dialect.reasoning_parser(template.source, architectures)
        forced = choice == "required" or isinstance(choice, tuple)
        if (forced or request.sampling.constrained) and not reasons_first:
            reasoning = ""  # the form binds from the first token on: there is nothing to reason in
        self.prompt = template.token_ids(request.messages, tools, **request.template)
        has_results = any(message.get("role") == "tool" for message in request.messages)
        self.warnings = (ESCAPED,) if has_results and template.escapes_tool_results else ()
        self._tokenizer, self._model_config = tokenizer, model_config
        self._options = dict(request.template)
        self._kind = _parser_class(tool_name, reasoning or None)
        self._parsers: dict[int, Parser] = {}
        self._fields: dict[str, Any] = {
            "model": "kvblend",
            "messages": [{"role": "user", "content": ""}],
            "tools": [_strict(tool) for tool in tools] if forced else tools or None,
            "tool_choice": _as_openai(choice),
            "parallel_tool_calls": request.parallel_tool_calls,
            "chat_template_kwargs": self._options,
        }
        self._request = compat.chat_request(**self._fields, structured_outputs=form(request.sampling))
        self._either = bool(tools) and choice == "auto" and request.sampling.constrained
        if self._kind is not None:
            try:
                self._request = self._parser(0).adjust_request(self._request)
            except Exception as error:
                raise ConfigError(f"vLLM's parser {tool_name or reasoning!r} can't be used: {error}") from error

    @property
    def structured_outputs(self) -> StructuredOutputsParams | None:
        """What the answer is constrained to."""
        found: StructuredOutputsParams | None = self._request.extract_structured_outputs()
        return self._call_or(found) if self._either and found is not None else found

    def _call_or(self, wanted: StructuredOutputsParams) -> StructuredOutputsParams:
        """A tool call or the wanted form: an agent that answers in a form must still be able to call its tools."""
        fields = {**self._fields, "tools": [_strict(tool) for tool in self._fields["tools"]], "tool_choice": "required"}
        forced = self._new_parser().adjust_request(compat.chat_request(**fields)).extract_structured_outputs()
        if forced is None or not forced.structural_tag:  # no grammar of native calls
            return wanted
        if wanted.regex is not None:
            answer = {"type": "regex", "pattern": wanted.regex}
        else:
            schema = json.loads(wanted.json) if wanted.json is not None else {"type": "object"}
            answer = {"type": "json_schema", "json_schema": schema}
        calls = json.loads(forced.structural_tag)["format"]
        both = {"type": "structural_tag", "format": {"type": "or", "elements": [calls, answer]}}
        return StructuredOutputsParams(structural_tag=json.dumps(both))

    @property
    def skip_special_tokens(self) -> bool:
        """False where the parser must see the tokens that mark a call."""
        return bool(self._request.skip_special_tokens)

    def delta(self, index: int, text: str, token_ids: Sequence[int], finished: bool) -> Parsed:
        """See :meth:`Turn.delta`."""
        if self._kind is None:
            return Parsed(text=text)
        message = self._parser(index).parse_delta(
            text, list(token_ids), self._request, prompt_token_ids=self.prompt, finished=finished
        )
        if message is None:
            return Parsed()
        return Parsed(
            text=message.content or "",
            reasoning=message.reasoning or "",
            tool_calls=tuple(
                ToolCallDelta(
                    index=call.index,
                    id=call.id,
                    name=call.function.name if call.function else None,
                    arguments=(call.function.arguments if call.function else None) or "",
                )
                for call in message.tool_calls or ()
            ),
        )

    def whole(self, text: str, token_ids: Sequence[int]) -> Parsed:
        """See :meth:`Turn.whole`."""
        if self._kind is None:
            return Parsed(text=text)
        parser = self._new_parser()
        compat.show_prompt(parser, self.prompt)
        reasoning, content, calls = parser.parse(
            text, self._request, enable_auto_tools=True, model_output_token_ids=list(token_ids)
        )
        return Parsed(
            text=content or "",
            reasoning=reasoning or "",
            tool_calls=tuple(
                ToolCallDelta(index=index, id=call.id, name=call.name, arguments=call.arguments or "")
                for index, call in enumerate(calls or ())
            ),
        )

    def _parser(self, index: int) -> Parser:
        if index not in self._parsers:
            self._parsers[index] = self._new_parser()
        return self._parsers[index]

    def _new_parser(self) -> Parser:
        assert self._kind is not None
        options = {} if self._model_config is None else {"model_config": self._model_config}
        return self._kind(self._tokenizer, self._request.tools, chat_template_kwargs=self._options, **options)


def form(sampling: Sampling) -> StructuredOutputsParams | None:
    """vLLM's constraint for the answer's prescribed form; None for none."""
    if sampling.json_schema is not None:
        return StructuredOutputsParams(json=json.dumps(sampling.json_schema))
    if sampling.json_object:
        return StructuredOutputsParams(json_object=True)
    return None if sampling.regex is None else StructuredOutputsParams(regex=sampling.regex)


@lru_cache(maxsize=64)
def _parser_class(tool_name: str | None, reasoning_name: str | None) -> type[Parser] | None:
    for name, manager, kind in (
        (tool_name, ToolParserManager, "tool"),
        (reasoning_name, ReasoningParserManager, "reasoning"),
    ):
        known = sorted(manager.list_registered())
        if name is not None and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
            raise ConfigError(f"vLLM {compat.version()} has no {kind} parser {name!r}. {hint}")
    parser: type[Parser] | None = ParserManager.get_parser(
        tool_parser_name=tool_name,
        reasoning_parser_name=reasoning_name,
        enable_auto_tools=tool_name is not None,
        is_harmony="openai" in (tool_name, reasoning_name) or reasoning_name == "openai_gptoss",
    )
    return parser


def _strict(tool: dict[str, Any]) -> dict[str, Any]:
    """Without the mark, vLLM constrains a native call's syntax and not its arguments."""
    return {**tool, "function": {**tool["function"], "strict": True}}


def _as_openai(choice: str | tuple[str]) -> Any:
    return {"type": "function", "function": {"name": choice[0]}} if isinstance(choice, tuple) else choice


__all__ = ["ParsedTurn", "form"]
