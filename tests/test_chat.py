"""Chat over the scripted engine: text, calls, reasoning, usage, settings, streaming and stopping."""

import asyncio
import json
import time

import pytest

from kvblend_rag.chat import Chat
from kvblend_rag.config import BlendConfig
from kvblend_rag.conversation.sampling import Sampling
from kvblend_rag.conversation.template import ESCAPED
from kvblend_rag.errors import ConfigError, KVBlendWarning, PromptTooLong, RequestTimeout
from kvblend_rag.kvblend import KVBlend
from kvblend_rag.testing import FakeEngine, WordTokenizer, fake_kvblend

HI = [{"role": "user", "content": "Hi."}]
SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Searches.",
        "parameters": {"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]},
    },
}
CALL = '<tool_call>\n{"name": "search", "arguments": {"q": "dragons"}}\n</tool_call>'
DOCUMENT = "The ferry to the northern island leaves at seven in the morning and returns at noon, except on Sundays. "


def chat(answers="Answer.", *, options=None, **engine):
    fake = FakeEngine(answers, **engine)
    return Chat(KVBlend(BlendConfig(), fake), **(options or {})), fake


async def gathered(deltas):
    return [delta async for delta in deltas]


def joined(deltas, name="text"):
    return "".join(getattr(delta, name) for delta in deltas)


def test_complete_and_stream_agree():
    talker, _ = chat("One two.\n\nThree, four!")
    result = talker.complete_sync(HI)
    deltas = list(talker.stream_sync(HI))
    assert result.text == joined(deltas) == "One two.\n\nThree, four!"
    assert result.finish_reason == deltas[-1].finish_reason == "stop"
    assert [delta.usage for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].usage.output_tokens == result.usage.output_tokens == len(deltas)
    assert deltas[-1].usage.input_tokens == len(result.prompt_token_ids)
    assert deltas[-1].report.prompt_tokens == len(deltas[-1].prompt_token_ids)


@pytest.mark.parametrize(
    "answer", ["<tool_", "a <", "a <tool_call> b", "a <tool_call>{broken}</tool_call>", "\n\n", "x\n"]
)
@pytest.mark.parametrize("tools", [(), (SEARCH,)])
def test_no_text_is_lost_or_repeated(answer, tools):
    talker, _ = chat(answer)
    assert joined(talker.stream_sync(HI, tools=tools)) == answer
    assert talker.complete_sync(HI, tools=tools).text == answer


def test_tool_calls_whole_and_streamed():
    talker, fake = chat(f"Looking.\n{CALL}\n{CALL}")
    result = talker.complete_sync(HI, tools=[SEARCH])
    assert (result.text, result.finish_reason) == ("Looking.", "tool_calls")
    assert [call.name for call in result.tool_calls] == ["search", "search"]
    assert json.loads(result.tool_calls[0].arguments) == {"q": "dragons"}
    assert len({call.id for call in result.tool_calls}) == 2
    deltas = list(talker.stream_sync(HI, tools=[SEARCH]))
    assert joined(deltas) == "Looking."
    assert [call.index for delta in deltas for call in delta.tool_calls] == [0, 1]
    assert '"name": "search"' in fake.requests[0].prompt


def test_one_call_when_several_are_not_allowed():
    talker, _ = chat(CALL + CALL)
    assert len(talker.complete_sync(HI, tools=[SEARCH], parallel_tool_calls=False).tool_calls) == 1
    streamed = list(talker.stream_sync(HI, tools=[SEARCH], parallel_tool_calls=False))
    assert len([call for delta in streamed for call in delta.tool_calls]) == 1


@pytest.mark.parametrize("choice", ["any", "required", "search", {"type": "function", "function": {"name": "search"}}])
def test_forced_calls(choice):
    answer = '[{"name": "search", "parameters": {"q": "x"}}]' if choice in ("any", "required") else '{"q": "x"}'
    talker, _ = chat(answer)
    (call,) = talker.complete_sync(HI, tools=[SEARCH], tool_choice=choice).tool_calls
    assert (call.name, json.loads(call.arguments)) == ("search", {"q": "x"})


def test_choice_none_hides_the_tools():
    talker, fake = chat(CALL)
    assert talker.complete_sync(HI, tools=[SEARCH], tool_choice="none").text == CALL
    assert "search" not in fake.requests[0].prompt


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [((SEARCH,), "serach", "tools are search"), ((), "any", "has no tools")],
)
def test_impossible_choice(tools, choice, message):
    talker, _ = chat()
    with pytest.raises(ConfigError, match=message):
        talker.complete_sync(HI, tools=tools, tool_choice=choice)


def test_reasoning_is_kept_apart():
    talker, _ = chat("<think>Hm, two.</think>\n\nTwo.", tokenizer=WordTokenizer(thinking=True))
    result = talker.complete_sync(HI)
    assert (result.reasoning, result.text) == ("Hm, two.", "Two.")
    deltas = list(talker.stream_sync(HI))
    assert (joined(deltas, "reasoning"), joined(deltas)) == ("Hm, two.", "Two.")
    assert talker.profile.reasoning_output


def test_reasoning_parser_can_be_switched_off():
    talker, _ = chat("<think>Hm.</think>Two.", tokenizer=WordTokenizer(thinking=True), options={"reasoning_parser": ""})
    assert talker.complete_sync(HI).text == "<think>Hm.</think>Two."


def test_several_answers():
    talker, _ = chat(["One.", "Two and more.", "Three."])
    result = talker.complete_sync(HI, sampling={"n": 3})
    assert [each.text for each in result.generations] == ["One.", "Two and more.", "Three."]
    talker, _ = chat(["One.", "Two and more.", "Three."])
    deltas = list(talker.stream_sync(HI, sampling={"n": 3}))
    texts = [joined(delta for delta in deltas if delta.index == index) for index in range(3)]
    assert texts == ["One.", "Two and more.", "Three."]
    assert sum(delta.finish_reason is not None for delta in deltas) == 3
    assert deltas[-1].usage == result.usage


def test_stop_and_limit():
    talker, _ = chat("one two three four")
    assert talker.complete_sync(HI, sampling={"stop": " three"}).text == "one two"
    limited = talker.complete_sync(HI, sampling={"max_tokens": 3})
    assert (limited.text, limited.finish_reason, limited.usage.output_tokens) == ("one two three", "length", 3)


def test_logprobs_only_when_asked():
    talker, _ = chat("one two")
    assert talker.complete_sync(HI).logprobs is None
    result = talker.complete_sync(HI, sampling={"logprobs": True, "top_logprobs": 1})
    assert "".join(each.token for each in result.logprobs) == "one two"
    assert result.logprobs[0].to_openai()["top_logprobs"][0]["token"] == "one"
    deltas = list(talker.stream_sync(HI, sampling={"logprobs": True}))
    assert [each for delta in deltas for each in delta.logprobs] == list(result.logprobs)


def test_settings_reach_the_engine():
    talker, fake = chat()
    schema = {"type": "object", "properties": {}}
    talker.complete_sync(
        HI,
        sampling={
            "temperature": 0.5,
            "seed": 7,
            "stop": ["x"],
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
        },
        blend={"ratio": 0.5},
    )
    settings = fake.requests[0].params.settings
    assert (settings.temperature, settings.seed, settings.stop, settings.json_schema) == (0.5, 7, ("x",), schema)
    assert fake.requests[0].options == {"tenant": "", "ratio": 0.5}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temprature": 1}, "mean 'temperature'"),
        ({"json_object": True, "regex": "a"}, "one form only"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "holds no schema"),
    ],
)
def test_unusable_settings(settings, message):
    talker, _ = chat()
    with pytest.raises(ConfigError, match=message):
        talker.complete_sync(HI, sampling=settings)


def test_unusable_blending_option():
    talker, _ = chat()
    with pytest.raises(ConfigError, match="selector"):
        talker.complete_sync(HI, blend={"selecter": "none"})


def test_prompt_too_long():
    talker, _ = chat(max_model_len=32)
    with pytest.raises(PromptTooLong, match="32 tokens"):
        talker.complete_sync([{"role": "user", "content": DOCUMENT * 9}])


def test_images_are_refused_in_one_sentence():
    talker, _ = chat()
    with pytest.raises(ConfigError, match="'image_url'; this model reads text only"):
        talker.complete_sync([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])


def test_contents_in_parts_are_joined():
    talker, fake = chat()
    talker.complete_sync([{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}])
    assert "a\nb" in fake.requests[0].prompt


def test_usage_counts_prefix_cache_and_reused_chunks(tmp_path):
    kv = fake_kvblend(store_path=tmp_path)
    talker = Chat(kv)
    kv.ingest([DOCUMENT * 3], document_ids=["a"], progress=False)
    result = talker.complete_sync([{"role": "user", "content": f"Context:\n\n{DOCUMENT * 3}\n\nWhen?"}])
    assert result.report.reused_tokens >= len(kv.engine.tokenizer.encode(DOCUMENT * 3)) - 2
    assert result.usage.cache_read == result.report.reused_tokens
    again = talker.complete_sync([{"role": "user", "content": f"Context:\n\n{DOCUMENT * 3}\n\nWhen?"}])
    assert again.usage.cache_read == again.report.cached_tokens + again.report.reused_tokens
    assert again.report.cached_tokens > 0
    kv.close()


def test_tool_results_that_the_template_escapes_are_warned_of_once():
    talker, _ = chat(tokenizer=WordTokenizer(escape_results=True))
    messages = [*HI, _called(), {"role": "tool", "tool_call_id": "c", "content": "first\nsecond"}]
    with pytest.warns(KVBlendWarning, match="escapes the newlines"):
        result = talker.complete_sync(messages, tools=[SEARCH])
    assert result.warnings == (ESCAPED,)
    assert list(talker.stream_sync(messages, tools=[SEARCH]))[-1].warnings == (ESCAPED,)
    plain, _ = chat()
    assert plain.complete_sync(messages, tools=[SEARCH]).warnings == ()


def test_a_template_without_tools_gets_them_in_the_system_message():
    talker, fake = chat(CALL, tokenizer=WordTokenizer(tools=False))
    messages = [{"role": "system", "content": "Be kind."}, *HI, _called(), {"role": "tool", "content": "first\nsecond"}]
    result = talker.complete_sync(messages, tools=[SEARCH])
    prompt = fake.requests[0].prompt
    assert prompt.index("Be kind.") < prompt.index("<tools>") < prompt.index('"search"') < prompt.index("Hi.")
    assert '<tool_call>\n{"name": "search", "arguments": {"q": "x"}}\n</tool_call>' in prompt
    assert "<|im_start|>user\n<tool_response>\nfirst\nsecond\n</tool_response>" in prompt
    assert result.tool_calls[0].name == "search"
    assert (talker.profile.tool_calling, talker.profile.native_tools) == (True, False)


def test_plain_completions():
    talker, fake = chat("more of it")
    assert talker.complete_text_sync("Some text").text == joined(talker.stream_text_sync("Some text")) == "more of it"
    assert fake.requests[0].prompt == "Some text"
    assert [each.text for each in talker.complete_text_batch(["a", "b"])] == ["more of it"] * 2


def test_a_batch_is_in_flight_at_once():
    talker, fake = chat(lambda request: request.prompt.split("user\n")[1].split("<")[0], delay=0.02)
    results = talker.complete_batch([[{"role": "user", "content": f"q{i}"}] for i in range(32)])
    assert [each.text for each in results] == [f"q{i}" for i in range(32)]
    assert fake.peak == 32


async def test_two_streams_at_once():
    talker, fake = chat(lambda request: "a b c d e" if "first" in request.prompt else "v w x y z", delay=0.01)
    asked = [[{"role": "user", "content": which}] for which in ("first", "second")]
    one, two = await asyncio.gather(*(gathered(talker.stream(messages)) for messages in asked))
    assert (joined(one), joined(two)) == ("a b c d e", "v w x y z")
    assert fake.peak == 2


async def test_leaving_a_stream_aborts_its_request():
    talker, fake = chat("a b c d e f g h", delay=0.02)
    deltas = talker.stream(HI)
    await anext(deltas)
    await deltas.aclose()
    await until(lambda: fake.aborted == ["fake-1"])


async def test_cancelling_a_task_aborts_its_request():
    talker, fake = chat("a b c d e f g h", delay=0.05)
    task = asyncio.create_task(talker.complete(HI))
    await until(lambda: fake.requests)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: fake.aborted == ["fake-1"])


def test_closing_a_synchronous_stream_aborts_its_request():
    talker, fake = chat("a b c d e f g h", delay=0.02)
    deltas = talker.stream_sync(HI)
    next(deltas)
    deltas.close()
    asyncio.run(until(lambda: fake.aborted == ["fake-1"]))


def test_timeout_stops_the_request():
    talker, fake = chat("a b c d e f g h", delay=0.1, options={"timeout": 0.15})
    with pytest.raises(RequestTimeout, match=r"0\.15 seconds"):
        talker.complete_sync(HI)
    asyncio.run(until(lambda: fake.aborted == ["fake-1"]))
    assert talker.complete_sync(HI, timeout=5).text == "a b c d e f g h"


async def test_synchronous_calls_inside_a_running_loop():
    talker, _ = chat("fine")
    assert talker.complete_sync(HI).text == "fine"


def test_an_engines_error_reaches_the_caller():
    talker, _ = chat([ConfigError("no such thing"), "fine"])
    with pytest.raises(ConfigError, match="no such thing"):
        list(talker.stream_sync(HI))
    assert talker.complete_sync(HI).text == "fine"


def test_sampling_is_itself():
    settings = Sampling(temperature=0.1)
    assert Sampling.of(settings) is settings
    assert Sampling.of(None) == Sampling()


def _called():
    function = {"name": "search", "arguments": '{"q": "x"}'}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": function}]}


async def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)
