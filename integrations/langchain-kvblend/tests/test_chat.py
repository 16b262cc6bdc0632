from __future__ import annotations

import asyncio
import itertools
import json
import time
from typing import Annotated, TypedDict

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler, UsageMetadataCallbackHandler
from langchain_core.exceptions import OutputParserException
from langchain_core.globals import set_llm_cache
from langchain_core.messages import AIMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.rate_limiters import InMemoryRateLimiter
from langchain_core.runnables import ConfigurableField
from langchain_core.tools import tool
from langchain_kvblend import ChatKVBlend
from pydantic import BaseModel, Field

from kvblend_rag.errors import ConfigError, KVBlendWarning, PromptTooLong, RequestTimeout
from kvblend_rag.testing import WordTokenizer

LONG = "one two three four five six seven eight nine ten"


def call(name, /, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"Sunny in {city}."


@tool
def clock() -> str:
    """The time."""
    return "noon"


class Person(BaseModel):
    """Somebody."""

    name: str = Field(description="What they are called.")
    age: int = Field(ge=0)


class PersonDict(TypedDict):
    """Somebody."""

    name: Annotated[str, ..., "What they are called."]
    age: int


def settings_of(kv, index=-1):
    return kv.engine.requests[index].params.settings


def whole(chunks):
    full = None
    for chunk in chunks:
        full = chunk if full is None else full + chunk
    return full


# What is asked


def test_sampling_settings_of_the_model_and_of_a_call(kv):
    llm = ChatKVBlend(
        kv=kv,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        seed=3,
        stop=["X"],
        max_tokens=11,
        frequency_penalty=0.2,
        model_kwargs={"min_tokens": 2},
    )
    llm.invoke("hi")
    one = settings_of(kv)
    assert (one.temperature, one.top_p, one.top_k, one.min_p, one.seed) == (0.5, 0.9, 7, 0.1, 3)
    assert (one.stop, one.max_tokens, one.frequency_penalty, one.extra) == (("X",), 11, 0.2, {"min_tokens": 2})
    llm.invoke("hi", stop=["Y"], temperature=0.0, max_completion_tokens=4, top_k=None)
    two = settings_of(kv)
    assert (two.temperature, two.top_p, two.top_k, two.stop, two.max_tokens) == (0.0, 0.9, None, ("Y",), 4)
    llm.bind(seed=9).invoke("hi")
    assert settings_of(kv).seed == 9


def test_stop_and_max_tokens_end_the_answer(make_kv):
    llm = ChatKVBlend(kv=make_kv(LONG), stop=["three"])
    assert llm.invoke("hi").content == "one two "
    assert llm.invoke("hi", stop=["five"]).content == "one two three four "
    cut = ChatKVBlend(kv=llm.kv, max_tokens=2).invoke("hi")
    assert cut.content == "one two"
    assert cut.response_metadata["finish_reason"] == "length"


def test_an_unknown_setting_of_a_call_is_refused(kv):
    llm = ChatKVBlend(kv=kv)
    with pytest.raises(ConfigError, match=r"'temprature'\. Did you mean 'temperature'"):
        llm.invoke("hi", temprature=1)
    with pytest.raises(ConfigError, match="runs fake-model; for gpt-9 make another"):
        llm.invoke("hi", model="gpt-9")
    assert llm.invoke("hi", model="fake-model").content == "Answer."


def test_blending_of_the_model_and_of_a_call(kv):
    llm = ChatKVBlend(kv=kv, blend={"ratio": 0.5})
    llm.invoke("hi", blend={"span": 4})
    assert {"ratio": 0.5, "span": 4}.items() <= kv.engine.requests[-1].options.items()


def test_a_prompt_too_long(make_kv):
    llm = ChatKVBlend(kv=make_kv(max_model_len=64))
    with pytest.raises(PromptTooLong, match="64"):
        llm.invoke("word " * 100)


def test_messages_of_every_kind(kv):
    history = [
        SystemMessage("Be brief."),
        HumanMessage([{"type": "text", "text": "What is"}, "the weather?"], name="anna"),
        AIMessage(
            [
                {"type": "reasoning", "reasoning": "secret"},
                {"type": "thinking", "thinking": "secret"},
                {"type": "text", "text": "I will look."},
                {"type": "tool_call", "name": "weather", "args": {"city": "Bern"}, "id": "1"},
                {"type": "tool_use", "name": "weather", "input": {"city": "Bern"}, "id": "1"},
            ],
            tool_calls=[{"name": "weather", "args": {"city": "Bern"}, "id": "1"}],
            invalid_tool_calls=[{"name": "clock", "args": '{"half', "id": "2", "error": "cut"}],
        ),
        ToolMessage("Sunny.", tool_call_id="1"),
        ChatMessage("And then?", role="user"),
    ]
    ChatKVBlend(kv=kv).invoke(history)
    prompt = kv.engine.requests[-1].prompt
    assert "system\nBe brief.<|im_end|>" in prompt
    assert "What is\nthe weather?" in prompt
    assert "I will look." in prompt
    assert "secret" not in prompt
    assert prompt.count('"city": "Bern"') == 1
    assert '{\\"half' in prompt or '"half' in prompt
    assert "<tool_response>\nSunny.\n</tool_response>" in prompt
    assert "user\nAnd then?" in prompt


@pytest.mark.parametrize(
    ("content", "written"),
    [
        ("First.\n\nSecond.", "First.\n\nSecond."),
        (["First.", "Second."], "First.\nSecond."),
        ([{"type": "text", "text": "First."}, {"type": "text", "text": "Second."}], "First.\nSecond."),
        ([{"type": "text", "text": "Überall"}, "roh"], "Überall\nroh"),
        ([{"type": "json", "json": {"a": "ü"}}], '{"a": "ü"}'),
        ([{"city": "Bern", "sun": True}], '{"city": "Bern", "sun": true}'),
        ([{"type": "text-plain", "text": "A file.", "mime_type": "text/plain"}], "A file."),
        ("", ""),
    ],
)
def test_tool_messages_of_every_form(kv, content, written):
    asked = AIMessage("", tool_calls=[{"name": "weather", "args": {"city": "Bern"}, "id": "1"}])
    ChatKVBlend(kv=kv).bind_tools([weather]).invoke([HumanMessage("hi"), asked, ToolMessage(content, tool_call_id="1")])
    assert f"<tool_response>\n{written}\n</tool_response>" in kv.engine.requests[-1].prompt


def test_pictures_are_refused(kv):
    picture = {"type": "image", "base64": "AAAA", "mime_type": "image/png"}
    with pytest.raises(ConfigError, match="text only"):
        ChatKVBlend(kv=kv).invoke([HumanMessage([{"type": "text", "text": "What is this?"}, picture])])


# What comes back


def test_answers_say_where_their_tokens_came_from(make_kv, words):
    kv = make_kv("Because.")
    text = words("tank")
    kv.ingest([text], progress=False)
    llm = ChatKVBlend(kv=kv)
    answer = llm.invoke(f"Read this: {text} And say why.")
    usage, about = answer.usage_metadata, answer.response_metadata
    report = about["blend_report"]
    assert about["model_name"] == "fake-model"
    assert about["model_provider"] == "kvblend"
    assert about["finish_reason"] == "stop"
    assert report["blended"]
    assert usage["input_token_details"]["cache_read"] == report["cached_tokens"] + report["reused_tokens"] > 40
    assert usage["input_tokens"] == report["prompt_tokens"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    json.dumps(about)

    streamed = whole(llm.stream(f"Read this: {text} And say more."))
    assert streamed.usage_metadata["input_token_details"]["cache_read"] > 40
    assert streamed.response_metadata["blend_report"]["blended"]
    assert streamed.response_metadata["model_name"] == "fake-model"
    assert streamed.response_metadata["finish_reason"] == "stop"


def test_log_probabilities(make_kv):
    llm = ChatKVBlend(kv=make_kv(LONG), logprobs=True, top_logprobs=2)
    given = llm.invoke("hi").response_metadata["logprobs"]["content"]
    assert "".join(each["token"] for each in given) == LONG
    assert {"token", "logprob", "bytes", "top_logprobs"} == given[0].keys()
    assert settings_of(llm.kv).top_logprobs == 2
    streamed = whole(llm.stream("hi")).response_metadata["logprobs"]["content"]
    assert [each["token"] for each in streamed] == [each["token"] for each in given]
    assert "logprobs" not in llm.invoke("hi", logprobs=False, top_logprobs=0).response_metadata


def test_reasoning_goes_beside_the_answer(make_kv):
    kv = make_kv("<think>It is a greeting.</think>Hello there.", tokenizer=WordTokenizer(thinking=True))
    llm = ChatKVBlend(kv=kv)
    for answer in (llm.invoke("hi"), whole(llm.stream("hi"))):
        assert answer.content == "Hello there."
        assert answer.additional_kwargs["reasoning_content"] == "It is a greeting."
        kinds = [block["type"] for block in answer.content_blocks]
        assert kinds == ["reasoning", "text"]
    assert llm.profile["reasoning_output"]
    plain = ChatKVBlend(kv=kv, reasoning_parser="").invoke("hi")
    assert plain.content.startswith("<think>")
    llm.invoke([HumanMessage("hi"), answer, HumanMessage("and?")])


@pytest.mark.parametrize("version", ["v0", "v1"])
def test_content_blocks(make_kv, version):
    kv = make_kv("Looking. " + call("weather", city="Bern"))
    llm = ChatKVBlend(kv=kv, output_version=version).bind_tools([weather])
    for answer in (llm.invoke("hi"), whole(llm.stream("hi"))):
        assert [block["type"] for block in answer.content_blocks] == ["text", "tool_call"]
        assert isinstance(answer.content, list if version == "v1" else str)


def test_several_answers(make_kv):
    llm = ChatKVBlend(kv=make_kv(["a b", "c d", "e f"]), n=2)
    result = llm.generate([[HumanMessage("hi")]])
    assert [each.text for each in result.generations[0]] == ["a b", "c d"]
    assert result.generations[0][1].message.usage_metadata is None
    with pytest.raises(ConfigError, match="n must be 1"):
        next(iter(llm.stream("hi")))
    assert whole(llm.stream("hi", n=1)).content == "e f"


def test_calls_that_are_no_json(make_kv):
    llm = ChatKVBlend(kv=make_kv('{"city": "Be', parsers="plain")).bind_tools([weather], tool_choice="weather")
    answer = llm.invoke("hi")
    assert answer.tool_calls == []
    assert answer.invalid_tool_calls[0]["name"] == "weather"
    assert answer.invalid_tool_calls[0]["args"] == '{"city": "Be'


# Streams


def test_a_stream_comes_piece_by_piece(make_kv):
    chunks = list(ChatKVBlend(kv=make_kv(LONG)).stream("hi"))
    assert "".join(chunk.content for chunk in chunks) == LONG
    assert len(chunks) >= 10
    assert [chunk.chunk_position for chunk in chunks].count("last") == 1
    assert sum(chunk.usage_metadata is not None for chunk in chunks) == 1


async def test_two_coroutines_stream_at_once(make_kv):
    kv = make_kv(lambda request: LONG if "first" in request.prompt else LONG.upper(), delay=0.01)
    llm = ChatKVBlend(kv=kv)
    order = []

    async def read(name):
        text = ""
        async for chunk in llm.astream(name):
            order.append(name)
            text += chunk.content
        return text

    assert await asyncio.gather(read("first"), read("second")) == [LONG, LONG.upper()]
    assert kv.engine.peak == 2
    changes = sum(one != other for one, other in itertools.pairwise(order))
    assert changes > 4


async def until(what):
    for _ in range(200):
        if what():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen")


@pytest.mark.parametrize("how", ["break", "cancel", "aclose"])
async def test_a_stream_that_is_left_frees_its_request(make_kv, how):
    kv = make_kv(LONG * 20, delay=0.02)
    llm = ChatKVBlend(kv=kv)
    stream = llm.astream("hi")
    if how == "cancel":

        async def read():
            async for _ in llm.astream("hi"):
                pass

        task = asyncio.create_task(read())
        await until(lambda: kv.engine.requests)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    elif how == "aclose":
        await anext(stream)
        await stream.aclose()
    else:
        async for _ in stream:
            break
        del stream
    await until(lambda: kv.engine.aborted)
    assert len(kv.engine.requests) == 1


def test_a_stream_that_is_closed_frees_its_request(make_kv):
    kv = make_kv(LONG * 20, delay=0.02)
    stream = ChatKVBlend(kv=kv).stream("hi")
    next(stream)
    stream.close()
    for _ in range(200):
        if kv.engine.aborted:
            break
        time.sleep(0.01)
    assert kv.engine.aborted


async def test_a_cancelled_invoke_frees_its_request(make_kv):
    kv = make_kv(LONG * 20, delay=0.02)
    task = asyncio.create_task(ChatKVBlend(kv=kv).ainvoke("hi"))
    await until(lambda: kv.engine.requests)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: kv.engine.aborted)


async def test_a_synchronous_call_inside_a_running_loop(make_kv):
    llm = ChatKVBlend(kv=make_kv(LONG))
    assert llm.invoke("hi").content == LONG
    assert "".join(chunk.content for chunk in llm.stream("hi")) == LONG


# Time


def test_a_request_out_of_time(make_kv):
    kv = make_kv(LONG * 10, delay=0.05)
    llm = ChatKVBlend(kv=kv, timeout=0.1)
    with pytest.raises(RequestTimeout):
        llm.invoke("hi")
    with pytest.raises(TimeoutError):
        list(llm.stream("hi"))
    kv.engine._delay = 0
    assert llm.invoke("hi", timeout=60).content


@pytest.mark.parametrize("streamed", [False, True])
async def test_retries(make_kv, streamed):
    kv = make_kv([RequestTimeout("slow"), RequestTimeout("slow"), "Done."])

    async def ask(llm, **more):
        if streamed:
            return whole([chunk async for chunk in llm.astream("hi", **more)])
        return await llm.ainvoke("hi", **more)

    with pytest.raises(RequestTimeout):
        await ask(ChatKVBlend(kv=kv, timeout=60))
    assert (await ask(ChatKVBlend(kv=kv, timeout=60), max_retries=2)).content == "Done."
    assert len(kv.engine.requests) == 3


def test_retries_without_a_loop(make_kv):
    kv = make_kv([RequestTimeout("slow"), "Done.", RequestTimeout("slow"), "Done."])
    llm = ChatKVBlend(kv=kv, max_retries=1, timeout=60)
    assert llm.invoke("hi").content == "Done."
    assert whole(llm.stream("hi")).content == "Done."


def test_what_was_seen_is_not_asked_again(make_kv):
    kv = make_kv(LONG * 10, delay=0.05)
    stream = ChatKVBlend(kv=kv, timeout=0.3, max_retries=5).stream("hi")
    assert next(stream).content
    with pytest.raises(RequestTimeout):
        list(stream)
    assert len(kv.engine.requests) == 1


# Batches


def test_a_batch_of_32_is_one_batch_of_the_engine(make_kv):
    kv = make_kv(lambda request: request.prompt.split("number ")[1].split("<")[0] + " it is", delay=0.3)
    llm = ChatKVBlend(kv=kv)
    asked = [f"number {place}" for place in range(32)]
    answers = llm.batch(asked)
    assert [answer.content for answer in answers] == [f"{place} it is" for place in range(32)]
    assert kv.engine.peak == 32
    done = dict(llm.batch_as_completed(asked))
    assert [done[place].content for place in range(32)] == [f"{place} it is" for place in range(32)]
    assert kv.engine.peak == 32


async def test_an_async_batch_of_32_is_one_batch_of_the_engine(make_kv):
    kv = make_kv("fine", delay=0.2)
    answers = await ChatKVBlend(kv=kv).abatch([f"{place}" for place in range(32)])
    assert len(answers) == 32
    assert kv.engine.peak == 32


def test_batches_keep_to_max_concurrency_and_give_errors(make_kv):
    kv = make_kv(lambda request: RequestTimeout("no") if "bad" in request.prompt else "fine", delay=0.05)
    llm = ChatKVBlend(kv=kv, timeout=60)
    answers = llm.batch(["a", "bad", "c"], {"max_concurrency": 1}, return_exceptions=True)
    assert [type(each) for each in answers] == [AIMessage, RequestTimeout, AIMessage]
    assert kv.engine.peak == 1
    with pytest.raises(RequestTimeout):
        llm.batch(["a", "bad"])
    assert llm.batch([]) == []


def test_a_chain_s_batch_is_one_batch(make_kv):
    kv = make_kv("fine", delay=0.2)
    chain = ChatPromptTemplate.from_messages([("human", "{x}")]) | ChatKVBlend(kv=kv)
    chain.batch([{"x": str(place)} for place in range(6)])
    assert kv.engine.peak == 6


# Callbacks


class Tokens(BaseCallbackHandler):
    def __init__(self):
        self.seen, self.ended, self.failed = [], [], []

    def on_llm_new_token(self, token, **kwargs):
        self.seen.append(token)

    def on_llm_end(self, response, **kwargs):
        self.ended.append(response)

    def on_llm_error(self, error, **kwargs):
        self.failed.append(error)


class AsyncTokens(AsyncCallbackHandler):
    def __init__(self):
        self.seen = []

    async def on_llm_new_token(self, token, **kwargs):
        self.seen.append(token)


@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
async def test_callbacks_see_every_token_once(make_kv):
    kv = make_kv(LONG)
    llm = ChatKVBlend(kv=kv)
    for read in (
        lambda config: list(llm.stream("hi", config)),
        lambda config: ChatKVBlend(kv=kv, streaming=True).invoke("hi", config),
        lambda config: list(llm.stream_events("hi", config, version="v3")),
    ):
        handler = Tokens()
        read({"callbacks": [handler]})
        assert "".join(handler.seen) == LONG
        assert handler.ended[0].generations[0][0].text == LONG

    async def events():
        async for _ in await llm.astream_events("hi", {"callbacks": [handler]}, version="v3"):
            pass

    async def stream():
        async for _ in llm.astream("hi", {"callbacks": [handler]}):
            pass

    for read in (events, stream):
        handler = AsyncTokens()
        await read()
        assert "".join(handler.seen) == LONG

    handler = Tokens()
    llm.invoke("hi", {"callbacks": [handler]})
    assert handler.seen == []
    assert handler.ended[0].generations[0][0].text == LONG


async def test_stream_events(make_kv):
    llm = ChatKVBlend(kv=make_kv(LONG))
    kinds = [event["event"] async for event in llm.astream_events("hi", version="v2")]
    assert kinds[0] == "on_chat_model_start"
    assert kinds[-1] == "on_chat_model_end"
    assert kinds.count("on_chat_model_stream") >= 10


def test_callbacks_see_errors_and_usage(make_kv):
    llm = ChatKVBlend(kv=make_kv([RequestTimeout("no"), "fine"]), timeout=60)
    handler = Tokens()
    with pytest.raises(RequestTimeout):
        llm.invoke("hi", {"callbacks": [handler]})
    assert isinstance(handler.failed[0], RequestTimeout)
    usage = UsageMetadataCallbackHandler()
    llm.invoke("hi", {"callbacks": [usage]})
    assert usage.usage_metadata["fake-model"]["output_tokens"] == 1


def test_a_rate_limiter(make_kv):
    llm = ChatKVBlend(kv=make_kv("fine"), rate_limiter=InMemoryRateLimiter(requests_per_second=1000))
    assert llm.invoke("hi").content == "fine"


# Identity


def test_a_global_cache_never_gives_another_configuration_s_answer(make_kv, tmp_path):
    set_llm_cache(InMemoryCache())
    store = {"store_path": tmp_path / "one"}
    one = make_kv("one", **store)
    two = make_kv("two", **store, model="other-model")
    changed = make_kv("changed", **store, config={"recompute_ratio": 0.5})
    assert ChatKVBlend(kv=one).invoke("hi").content == "one"
    assert ChatKVBlend(kv=one).invoke("hi").content == "one"
    assert len(one.engine.requests) == 1
    assert ChatKVBlend(kv=two).invoke("hi").content == "two"
    assert ChatKVBlend(kv=changed).invoke("hi").content == "changed"
    different = [
        {"temperature": 0.5},
        {"top_p": 0.5},
        {"top_k": 5},
        {"min_p": 0.5},
        {"seed": 5},
        {"stop": ["x"]},
        {"max_tokens": 5},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 0.5},
        {"logprobs": True},
        {"top_logprobs": 2},
        {"model_kwargs": {"min_tokens": 1}},
        {"blend": {"blend": False}},
        {"tool_parser": "hermes"},
        {"reasoning_parser": ""},
        {"chat_template_kwargs": {"x": 1}},
        {"parallel_tool_calls": False},
        {"output_version": "v1"},
        {"n": 2},
    ]
    for count, more in enumerate(different, 2):
        ChatKVBlend(kv=one, **more).invoke("hi")
        assert len(one.engine.requests) == count, more
    calls = [{"tools": [{"type": "function", "function": {"name": "f"}}]}, {"temperature": 0.7}, {"stop": ["y"]}]
    for count, more in enumerate(calls, len(different) + 2):
        ChatKVBlend(kv=one).invoke("hi", **more)
        assert len(one.engine.requests) == count, more
    asked = len(one.engine.requests)
    adds = [{"blend": {"span": 4}}, {"chat_template_kwargs": {"y": 1}}]  # to what the model has
    for more in adds:
        ChatKVBlend(kv=one).invoke("hi", **more)
        ChatKVBlend(kv=one, **{name: {"ratio": 0.5} if name == "blend" else {"x": 2} for name in more}).invoke(
            "hi", **more
        )
    assert len(one.engine.requests) == asked + 4
    same = [{"timeout": 5}, {"max_retries": 3}, {"streaming": False}]
    for more in same:
        ChatKVBlend(kv=one, **more).invoke("hi")
        assert len(one.engine.requests) == asked + 4, more


def test_models_of_different_paths_differ(tmp_path):
    settings = {"store_path": str(tmp_path)}
    one = ChatKVBlend(model="a", settings=settings)._get_llm_string()
    assert one != ChatKVBlend(model="b", settings=settings)._get_llm_string()
    assert one != ChatKVBlend(model="a", settings=settings, engine_args={"dtype": "float32"})._get_llm_string()
    assert one == ChatKVBlend(model="a", settings=settings)._get_llm_string()


def test_tracing_parameters(kv):
    llm = ChatKVBlend(kv=kv, temperature=0.3, max_tokens=9, stop=["x"])
    params = llm._get_ls_params()
    assert params["ls_provider"] == "kvblend"
    assert params["ls_model_name"] == "fake-model"
    assert (params["ls_temperature"], params["ls_max_tokens"], params["ls_stop"]) == (0.3, 9, ["x"])
    assert llm._get_ls_params(stop=["y"])["ls_stop"] == ["y"]
    assert llm._llm_type == "chat-kvblend"


def test_the_profile_is_read_from_the_engine(make_kv, monkeypatch, tmp_path):
    from kvblend_rag.testing import FakeEngine

    started = []

    def launch(config):
        started.append(FakeEngine(max_model_len=777))
        return started[-1]

    monkeypatch.setattr("kvblend_rag.kvblend._launch", launch)
    llm = ChatKVBlend(model="m", settings={"store_path": str(tmp_path)})
    repr(llm)
    assert not started
    profile = llm.profile
    assert (profile["max_input_tokens"], profile["tool_calling"], profile["structured_output"]) == (777, True, True)
    assert profile["reasoning_output"] is False
    assert llm.profile is profile
    assert len(started) == 1
    own = ChatKVBlend(model="m", settings={"store_path": str(tmp_path)}, profile={"max_input_tokens": 5})
    assert own.profile == {"max_input_tokens": 5}
    with pytest.raises(AttributeError):
        _ = llm.no_such_thing
    llm.close()


def test_the_profile_of_a_folder_needs_no_engine(tmp_path, monkeypatch):
    monkeypatch.setattr("kvblend_rag.kvblend._launch", lambda config: pytest.fail("the engine must not start"))
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 512}')
    (tmp_path / "chat_template.jinja").write_text("<think> enable_thinking {{ tools }}")
    profile = ChatKVBlend(model=tmp_path, settings={"store_path": str(tmp_path / "store")}).profile
    assert (profile["max_input_tokens"], profile["reasoning_output"], profile["tool_calling"]) == (512, True, True)


def test_numbers_of_tokens_are_the_model_s(kv):
    llm = ChatKVBlend(kv=kv)
    assert llm.get_num_tokens("one two three.") == 4
    assert llm.get_token_ids("one two") == kv.engine.tokenizer.encode("one two")
    messages = [SystemMessage("Be brief."), HumanMessage("hi")]
    alone = llm.get_num_tokens_from_messages(messages)
    assert alone == llm.invoke(messages).usage_metadata["input_tokens"]
    with_tools = llm.get_num_tokens_from_messages(messages, tools=[weather])
    assert with_tools == llm.bind_tools([weather]).invoke(messages).usage_metadata["input_tokens"] > alone


def test_copies_and_configurable_fields(make_kv):
    kv = make_kv(LONG, parsers="vllm")
    llm = ChatKVBlend(kv=kv, temperature=0.1)
    llm.invoke("hi")
    copied = llm.model_copy(update={"temperature": 0.9})
    copied.invoke("hi")
    assert settings_of(kv).temperature == 0.9
    with pytest.raises(ConfigError, match="no_such"):
        llm.model_copy(update={"tool_parser": "no_such"}).bind_tools([weather]).invoke("hi")
    free = llm.configurable_fields(temperature=ConfigurableField(id="t"))
    free.invoke("hi", {"configurable": {"t": 0.4}})
    assert settings_of(kv).temperature == 0.4


# Tools


@pytest.mark.parametrize("parsers", ["plain", "vllm"])
def test_a_tool_call_whole_and_streamed(make_kv, parsers):
    kv = make_kv("Let me look. " + call("weather", city="Zürich") + "\n" + call("clock"), parsers=parsers)
    llm = ChatKVBlend(kv=kv).bind_tools([weather, clock])
    for answer in (llm.invoke("hi"), whole(llm.stream("hi"))):
        assert [(each["name"], each["args"]) for each in answer.tool_calls] == [
            ("weather", {"city": "Zürich"}),
            ("clock", {}),
        ]
        assert len({each["id"] for each in answer.tool_calls}) == 2
        assert answer.content.strip() == "Let me look."
        assert answer.response_metadata["finish_reason"] == "tool_calls"
    request = kv.engine.requests[-1].prompt
    assert '"name": "weather"' in request


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("any", "required"), ("required", "required"), (True, "required"), ("weather", "weather"), ("auto", None)],
)
def test_tool_choice(make_kv, choice, expected):
    kv = make_kv(call("weather", city="Bern"), parsers="vllm")
    answer = ChatKVBlend(kv=kv).bind_tools([weather, clock], tool_choice=choice).invoke("hi")
    assert answer.tool_calls[0]["name"] == "weather"
    form = kv.engine.requests[-1].params.structured_outputs
    assert (form is not None) == (expected is not None)
    if form is not None:
        assert ("clock" in form.structural_tag) == (expected == "required")


def test_no_tool_is_called_when_none_may_be(make_kv):
    kv = make_kv("Just text.")
    ChatKVBlend(kv=kv).bind_tools([weather], tool_choice="none").invoke("hi")
    assert "weather" not in kv.engine.requests[-1].prompt
    with pytest.raises(ConfigError, match="clock"):
        ChatKVBlend(kv=kv).bind_tools([weather], tool_choice="clock").invoke("hi")


def test_one_call_at_most(make_kv):
    kv = make_kv(call("weather", city="Bern") + call("clock"))
    llm = ChatKVBlend(kv=kv)
    assert len(llm.bind_tools([weather, clock]).invoke("hi").tool_calls) == 2
    assert len(llm.bind_tools([weather, clock], parallel_tool_calls=False).invoke("hi").tool_calls) == 1
    assert len(ChatKVBlend(kv=kv, parallel_tool_calls=False).bind_tools([weather]).invoke("hi").tool_calls) == 1


def test_tools_of_every_form(kv):
    def plain(city: str) -> str:
        """A function."""
        return city

    given = {"type": "function", "function": {"name": "given", "description": "d", "parameters": {"type": "object"}}}
    ChatKVBlend(kv=kv).bind_tools([weather, plain, Person, PersonDict, given]).invoke("hi")
    prompt = kv.engine.requests[-1].prompt
    for name in ("weather", "plain", "Person", "PersonDict", "given"):
        assert f'"name": "{name}"' in prompt


def test_a_template_that_escapes_results_is_named(make_kv):
    kv = make_kv(tokenizer=WordTokenizer(escape_results=True))
    llm = ChatKVBlend(kv=kv)
    asked = AIMessage("", tool_calls=[{"name": "weather", "args": {"city": "Bern"}, "id": "1"}])
    history = [HumanMessage("hi"), asked, ToolMessage("Two\nlines.", tool_call_id="1")]
    with pytest.warns(KVBlendWarning, match="escapes the newlines"):
        answer = llm.invoke(history)
    assert answer.response_metadata["blend_warnings"] == ["tool_results_escaped"]


# Forms

ANNA = '{"name": "Anna", "age": 7}'


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
@pytest.mark.parametrize("schema", [Person, PersonDict, Person.model_json_schema()], ids=["pydantic", "typed", "dict"])
def test_structured_output(make_kv, method, schema):
    written = call("Person" if schema is not PersonDict else "PersonDict", name="Anna", age=7)
    kv = make_kv(written if method == "function_calling" else ANNA, parsers="vllm")
    llm = ChatKVBlend(kv=kv).with_structured_output(schema, method=method)
    expected = Person(name="Anna", age=7) if schema is Person else {"name": "Anna", "age": 7}
    assert llm.invoke("who?") == expected
    pieces = list(llm.stream("who?"))
    assert pieces[-1] == expected
    raw = ChatKVBlend(kv=kv).with_structured_output(schema, method=method, include_raw=True).invoke("who?")
    assert raw["parsed"] == expected
    assert raw["parsing_error"] is None
    assert isinstance(raw["raw"], AIMessage)
    asked = kv.engine.requests[-1].params
    if method == "json_schema":
        assert asked.settings.json_schema["properties"]["age"]["type"] == "integer"
    elif method == "json_mode":
        assert asked.settings.json_object
    else:
        assert "Person" in asked.structured_outputs.structural_tag


def test_structured_output_keeps_bounds_and_references(kv):
    class Node(BaseModel):
        value: int = Field(ge=1, le=5)
        children: list[Node] = []

    llm = ChatKVBlend(kv=kv).with_structured_output(Node, include_raw=True)
    llm.invoke("hi")
    schema = settings_of(kv).json_schema
    assert schema["$defs"]["Node"]["properties"]["value"] == {
        "maximum": 5,
        "minimum": 1,
        "title": "Value",
        "type": "integer",
    }


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
@pytest.mark.parametrize("schema", [Person, PersonDict], ids=["pydantic", "typed"])
def test_structured_output_that_was_cut_is_never_mended(make_kv, method, schema):
    written = call(schema.__name__, name="Anna", age=7) if method == "function_calling" else ANNA
    llm = ChatKVBlend(kv=make_kv(written), max_tokens=9)
    with pytest.raises(OutputParserException, match="raise max_tokens"):
        llm.with_structured_output(schema, method=method).invoke("who?")
    with pytest.raises(OutputParserException, match="raise max_tokens"):
        list(llm.with_structured_output(schema, method=method).stream("who?"))
    raw = llm.with_structured_output(schema, method=method, include_raw=True).invoke("who?")
    assert raw["parsed"] is None
    assert isinstance(raw["parsing_error"], OutputParserException)


def test_structured_output_that_is_wrong(make_kv):
    llm = ChatKVBlend(kv=make_kv('{"name": "Anna"}')).with_structured_output(Person, method="json_mode")
    with pytest.raises(OutputParserException, match="age"):
        llm.invoke("who?")


def test_structured_output_in_ways_that_can_not_be(kv):
    llm = ChatKVBlend(kv=kv)
    with pytest.raises(ConfigError, match="needs a schema"):
        llm.with_structured_output()
    with pytest.raises(ConfigError, match="must be json_schema, function_calling or json_mode"):
        llm.with_structured_output(Person, method="magic")


def test_json_mode_without_a_schema(make_kv):
    assert ChatKVBlend(kv=make_kv(ANNA)).with_structured_output(method="json_mode").invoke("who?") == json.loads(ANNA)


def test_openai_s_function_dictionary_is_a_schema(make_kv):
    from langchain_core.utils.function_calling import convert_to_openai_tool

    kv = make_kv(ANNA)
    given = convert_to_openai_tool(Person)
    for schema in (given, given["function"]):
        assert ChatKVBlend(kv=kv).with_structured_output(schema).invoke("who?") == json.loads(ANNA)
        assert settings_of(kv).json_schema["properties"].keys() == {"name", "age"}


# Documents in prompts


def test_which_documents_were_found(make_kv, words):
    from langchain_core.documents import Document

    kv = make_kv("Fine.")
    known, unknown = Document(words("known")), Document(words("unknown"))
    kv.ingest([known.page_content], progress=False)
    llm = ChatKVBlend(kv=kv)
    answer = llm.invoke(f"Context:\n\n{known.page_content}\n\n{unknown.page_content}\n\nWhy?")
    first, second, third = llm.found_documents(answer, [known, unknown, Document(words("elsewhere"))])
    assert (first.found, first.reason) == ("fully", None)
    assert first.reused >= first.of - 2
    assert second.reason == third.reason == "not ingested"
    streamed = whole(llm.stream(f"Again:\n\n{known.page_content}\n\nWhy?"))
    assert llm.found_documents(streamed, [known])[0].found == "fully"
    assert llm.found_documents(streamed.response_metadata, [known])[0].found == "fully"
    with pytest.raises(ConfigError, match="none of the last"):
        llm.found_documents(AIMessage("hi"), [known])
