"""Chat on vLLM itself with the bundled reader: forms that validate, forced calls, streams that end."""

import asyncio
import json
import time

import pytest

pytest.importorskip("vllm")

from kvblend_rag.chat import Chat
from kvblend_rag.documents import DocumentSync, which_found
from kvblend_rag.errors import ConfigError, PromptTooLong

ASK = [{"role": "user", "content": "Who is Anna, a baker from Rome who is thirty? Answer as JSON."}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer"},
        "city": {"enum": ["Rome", "Paris"]},
    },
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "About a person.", "parameters": SCHEMA}}
    for name in ("make_person", "find_person")
]
GREEDY = {"temperature": 0, "max_tokens": 120}
DOCUMENT = (
    "The ferry to the northern island leaves at seven in the morning and returns at noon, except on Sundays. "
    "Tickets are sold on board by the mate, who takes coins only and gives no change."
)


@pytest.fixture(scope="module")
def chat(reader_llm):
    return Chat(reader_llm.kvblend)


def check(text):
    value = json.loads(text)
    assert set(value) == {"name", "age", "city"}
    assert isinstance(value["age"], int)
    assert value["city"] in ("Rome", "Paris")


def test_profile(chat):
    assert chat.profile.max_input_tokens == 4096
    assert chat.profile.tool_calling
    assert not chat.profile.native_tools


def test_a_prescribed_form_validates(chat):
    check(chat.complete_sync(ASK, sampling={**GREEDY, "json_schema": SCHEMA}).text)
    deltas = list(chat.stream_sync(ASK, sampling={**GREEDY, "json_schema": SCHEMA}))
    check("".join(delta.text for delta in deltas))
    assert chat.complete_text_sync("Is it? ", sampling={**GREEDY, "regex": "(yes|no)"}).text in ("yes", "no")


def test_any_json_object(chat):
    answer = chat.complete_sync(ASK, sampling={**GREEDY, "json_object": True})
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.text), dict)


@pytest.mark.parametrize("parser", [None, "phi4_mini_json"])
@pytest.mark.parametrize("choice", ["any", "find_person"])
def test_forced_calls_validate(reader_llm, parser, choice):
    talker = Chat(reader_llm.kvblend, tool_parser=parser)
    options = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False, "sampling": GREEDY}
    result = talker.complete_sync(ASK, **options)
    (call,) = result.tool_calls
    assert call.name in (("make_person", "find_person") if choice == "any" else (choice,))
    check(call.arguments)
    assert result.finish_reason == "tool_calls"
    pieces = [piece for delta in talker.stream_sync(ASK, **options) for piece in delta.tool_calls]
    assert pieces[0].name == call.name
    check("".join(piece.arguments for piece in pieces))


def test_stream_is_the_whole(chat):
    messages = [{"role": "user", "content": f"Read this:\n\n{DOCUMENT}\n\nWhen does the ferry leave?"}]
    whole = chat.complete_sync(messages, sampling=GREEDY)
    deltas = list(chat.stream_sync(messages, sampling={**GREEDY, "logprobs": True, "top_logprobs": 2}))
    assert "".join(delta.text for delta in deltas) == whole.text
    assert deltas[-1].usage.output_tokens == whole.usage.output_tokens
    assert deltas[-1].finish_reason == whole.finish_reason
    logprobs = [each for delta in deltas for each in delta.logprobs]
    assert len(logprobs) == whole.usage.output_tokens
    assert all(len(each.top) >= 2 for each in logprobs)


def test_several_answers(chat):
    settings = {"n": 2, "max_tokens": 4, "temperature": 1.0, "seed": 1}
    assert len(chat.complete_sync(ASK, sampling=settings).generations) == 2
    deltas = list(chat.stream_sync(ASK, sampling=settings))
    assert sorted(delta.index for delta in deltas if delta.finish_reason) == [0, 1]


def test_documents_are_reused_and_counted(chat, reader_llm):
    kv = reader_llm.kvblend
    sync = DocumentSync(kv)
    assert sync.add(["ferry"], [DOCUMENT]).computed == 1
    messages = [{"role": "user", "content": f"Use this.\n\n{DOCUMENT}\n\nHow are tickets paid?"}]
    result = chat.complete_sync(messages, sampling=GREEDY)
    (use,) = which_found(kv, result.report, [DOCUMENT], result.prompt_token_ids)
    assert use.found == "fully"
    assert result.usage.cache_read == result.report.cached_tokens + result.report.reused_tokens
    assert result.report.reused_tokens > 0
    assert sync.delete(["ferry"]) == 1


async def test_a_cancelled_stream_frees_its_request(chat, reader_llm):
    deltas = chat.stream(ASK, sampling={"max_tokens": 2000, "temperature": 0, "extra": {"ignore_eos": True}})
    await anext(deltas)
    await deltas.aclose()
    processor = reader_llm.kvblend.engine._llm.output_processor
    end = time.monotonic() + 120
    while processor.has_unfinished_requests():
        assert time.monotonic() < end
        await asyncio.sleep(0.1)


async def test_two_streams_at_once(chat):
    async def text():
        return "".join([delta.text async for delta in chat.stream(ASK, sampling=GREEDY)])

    one, two = await asyncio.gather(text(), text())
    assert one == two


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature"),
        ({"json_schema": {"type": "nonsense"}}, "nonsense"),
        ({"extra": {"no_such_thing": 1}}, "no_such_thing"),
    ],
)
def test_unusable_settings_are_named(chat, settings, message):
    with pytest.raises(ConfigError, match=message):
        chat.complete_sync(ASK, sampling=settings)


def test_a_prompt_beyond_the_context(chat):
    with pytest.raises(PromptTooLong, match="4096"):
        chat.complete_sync([{"role": "user", "content": DOCUMENT * 200}])
