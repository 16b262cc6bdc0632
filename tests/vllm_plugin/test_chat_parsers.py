"""vLLM's own parsers behind the scripted engine."""

import json

import pytest
from packaging.version import Version

pytest.importorskip("vllm")

from kvblend_rag.chat import Chat
from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import ConfigError
from kvblend_rag.kvblend import KVBlend
from kvblend_rag.testing import FakeEngine, WordTokenizer
from kvblend_rag.vllm_plugin import compat

HI = [{"role": "user", "content": "Hi."}]
SCHEMA = {"type": "object", "properties": {"q": {"type": "string"}, "k": {"type": "integer"}}, "required": ["q"]}
SEARCH = {"type": "function", "function": {"name": "search", "description": "Searches.", "parameters": SCHEMA}}
FETCH = {"type": "function", "function": {"name": "fetch", "description": "Fetches.", "parameters": SCHEMA}}
TOOLS = [SEARCH, FETCH]
HERMES = '<tool_call>\n{"name": "search", "arguments": {"q": "dragons", "k": 2}}\n</tool_call>'
NATIVE = {
    "hermes": HERMES,
    "llama3_json": '{"name": "search", "parameters": {"q": "dragons", "k": 2}}',
    "pythonic": '[search(q="dragons", k=2)]',
    "qwen3_xml": "<tool_call>\n<function=search>\n<parameter=q>\ndragons\n</parameter>\n"
    "<parameter=k>\n2\n</parameter>\n</function>\n</tool_call>",
    "granite": '<|tool_call|>[{"name": "search", "arguments": {"q": "dragons", "k": 2}}]',
    "phi4_mini_json": 'functools[{"name": "search", "arguments": {"q": "dragons", "k": 2}}]',
}


class Tokenizer(WordTokenizer):
    """Knows the marks that parsers look for in the vocabulary."""

    def get_vocab(self):
        marks = ["<tool_call>", "</tool_call>", "<think>", "</think>", "<|python_tag|>", "<|tool_call|>"]
        return {**super().get_vocab(), **{mark: self.convert_tokens_to_ids(mark) for mark in marks}}


def chat(answer, parser=None, thinking=False, **options):
    engine = FakeEngine(answer, tokenizer=Tokenizer(thinking=thinking), parsers="vllm")
    return Chat(KVBlend(BlendConfig(), engine), tool_parser=parser, **options), engine


def streamed(deltas):
    """Text, reasoning and calls, put together as a client does."""
    text, reasoning, calls = "", "", {}
    for delta in deltas:
        text += delta.text
        reasoning += delta.reasoning
        for call in delta.tool_calls:
            if call.index not in calls:
                assert call.id
                assert call.name
            name, arguments = calls.get(call.index, (call.name, ""))
            calls[call.index] = (name, arguments + call.arguments)
    return text, reasoning, [(name, json.loads(arguments)) for name, arguments in calls.values()]


@pytest.mark.parametrize("parser", NATIVE)
def test_native_calls(parser):
    talker, _ = chat(NATIVE[parser], parser)
    (call,) = talker.complete_sync(HI, tools=TOOLS).tool_calls
    assert (call.name, json.loads(call.arguments)) == ("search", {"q": "dragons", "k": 2})
    text, _, calls = streamed(talker.stream_sync(HI, tools=TOOLS))
    assert calls == [("search", {"q": "dragons", "k": 2})]
    if parser != "granite" or Version(compat.version()) >= Version("0.32"):  # before, vLLM let its mark through
        assert text.strip() == ""


@pytest.mark.parametrize("parser", NATIVE)
@pytest.mark.parametrize("answer", ["No call here.", "One < two, [sic] {x}.", "a\n\nb\n", "Ends with <tool_"])
def test_plain_text_passes_whole(parser, answer):
    talker, _ = chat(answer, parser)
    assert talker.complete_sync(HI, tools=TOOLS).text == answer
    assert streamed(talker.stream_sync(HI, tools=TOOLS))[0] == answer


def test_parallel_calls_with_text():
    talker, _ = chat(f"Let me look.\n{HERMES}\n{HERMES}")
    result = talker.complete_sync(HI, tools=TOOLS)
    text, _, calls = streamed(talker.stream_sync(HI, tools=TOOLS))
    assert result.text.strip() == text.strip() == "Let me look."
    assert len(calls) == len(result.tool_calls) == 2
    assert len({call.id for call in result.tool_calls}) == 2
    assert result.finish_reason == "tool_calls"


@pytest.mark.parametrize("choice", ["any", "search"])
def test_forced_native_calls_are_constrained_to_the_schema(choice):
    talker, engine = chat(HERMES)
    (call,) = talker.complete_sync(HI, tools=TOOLS, tool_choice=choice).tool_calls
    assert call.name == "search"
    assert streamed(talker.stream_sync(HI, tools=TOOLS, tool_choice=choice))[2][0][0] == "search"
    tag = engine.requests[0].params.structured_outputs.structural_tag
    assert '"required": ["q"]' in tag
    assert ("fetch" in tag) == (choice == "any")


@pytest.mark.parametrize(
    ("choice", "answer"),
    [
        ("any", '[{"name": "search", "parameters": {"q": "dragons"}}, {"name": "fetch", "parameters": {"q": "x"}}]'),
        ("search", '{"q": "dragons"}'),
    ],
)
def test_forced_calls_in_json(choice, answer):
    talker, engine = chat(answer, "phi4_mini_json")
    result = talker.complete_sync(HI, tools=TOOLS, tool_choice=choice)
    calls = streamed(talker.stream_sync(HI, tools=TOOLS, tool_choice=choice))[2]
    assert calls == [(call.name, json.loads(call.arguments)) for call in result.tool_calls]
    assert calls[0] == ("search", {"q": "dragons"})
    assert result.text == ""
    assert engine.requests[0].params.structured_outputs.json


def test_a_forced_call_that_runs_out_of_tokens_is_not_lost():
    talker, _ = chat('[{"name": "search", "parameters": {"q": "drag', "phi4_mini_json")
    result = talker.complete_sync(HI, tools=TOOLS, tool_choice="any", sampling={"max_tokens": 8})
    assert result.finish_reason == "length"
    assert result.text or result.tool_calls


def test_prescribed_form_beside_tools():
    talker, engine = chat('{"q": "x"}')
    assert talker.complete_sync(HI, sampling={"json_schema": SCHEMA}).text == '{"q": "x"}'
    assert json.loads(engine.requests[0].params.structured_outputs.json) == SCHEMA
    talker.complete_sync(HI, sampling={"regex": "a+"})
    assert engine.requests[1].params.structured_outputs.regex == "a+"
    talker.complete_sync(HI, sampling={"json_object": True})
    assert engine.requests[2].params.structured_outputs.json_object


@pytest.mark.parametrize("tools", [(), TOOLS])
def test_reasoning(tools):
    answer = "<think>\nHm, dragons.\n</think>\n\nThey are big."
    talker, _ = chat(answer, thinking=True)
    result = talker.complete_sync(HI, tools=tools)
    text, reasoning, _ = streamed(talker.stream_sync(HI, tools=tools))
    assert result.reasoning.strip() == reasoning.strip() == "Hm, dragons."
    assert result.text.strip() == text.strip() == "They are big."


def test_reasoning_then_a_call():
    talker, _ = chat(f"<think>\nI must look.\n</think>\n\n{HERMES}", thinking=True)
    result = talker.complete_sync(HI, tools=TOOLS)
    text, reasoning, calls = streamed(talker.stream_sync(HI, tools=TOOLS))
    assert result.reasoning.strip() == reasoning.strip() == "I must look."
    assert calls == [("search", {"q": "dragons", "k": 2})]
    assert result.tool_calls[0].name == "search"
    assert text.strip() == ""


def test_prescribed_form_is_not_taken_for_reasoning():
    talker, _ = chat('{"q": "x"}', thinking=True)
    assert talker.complete_sync(HI, sampling={"json_schema": SCHEMA}).text == '{"q": "x"}'
    assert streamed(talker.stream_sync(HI, sampling={"json_schema": SCHEMA}))[:2] == ('{"q": "x"}', "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tool_parser": "hermess"}, "no tool parser 'hermess'. Did you mean 'hermes'"),
        ({"reasoning_parser": "qwen33"}, "Did you mean 'qwen3'"),
    ],
)
def test_unknown_parsers(options, message):
    talker = Chat(KVBlend(BlendConfig(), FakeEngine(parsers="vllm")), **options)
    with pytest.raises(ConfigError, match=message):
        talker.complete_sync(HI, tools=TOOLS)


def test_every_parser_of_the_table_exists():
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    from kvblend_rag.conversation import dialect

    assert {row.parser for row in dialect._TOOLS} <= set(ToolParserManager.list_registered())
    assert {row.parser for row in dialect._REASONING} <= set(ReasoningParserManager.list_registered())


@pytest.mark.parametrize(
    ("sampling", "answer"),
    [
        ({"json_schema": {"type": "object", "properties": {"d": {"type": "integer"}}, "required": ["d"]}}, '{"d": 7}'),
        ({"json_object": True}, '{"any": 1}'),
        ({"regex": "[a-c]+"}, "abc"),
    ],
)
def test_an_answer_in_a_form_may_be_a_call_instead(sampling, answer):
    import xgrammar

    talker, engine = chat(HERMES)
    assert talker.complete_sync(HI, tools=TOOLS, sampling=sampling).tool_calls
    form = engine.requests[-1].params.structured_outputs
    grammar = xgrammar.Grammar.from_structural_tag(form.structural_tag)
    for text, accepted in ((HERMES, True), (answer, True), ("Just text.", False), (HERMES + answer, False)):
        assert xgrammar.testing._is_grammar_accept_string(grammar, text) == accepted
    talker, engine = chat(answer)
    result = talker.complete_sync(HI, tools=TOOLS, sampling=sampling)
    assert (result.text, result.tool_calls) == (answer, ())
    talker.complete_sync(HI, tools=TOOLS, tool_choice="none", sampling=sampling)
    assert engine.requests[-1].params.structured_outputs.structural_tag is None
