from __future__ import annotations

import json

import pytest
from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    ImageBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.prompts import PromptTemplate
from llama_index.llms.kvblend import KVBlendLLM
from llama_index.llms.kvblend.messages import as_openai

from kvblend_rag.errors import ConfigError, PromptTooLong, RequestTimeout
from kvblend_rag.report import BlendReport
from kvblend_rag.testing import WordTokenizer

ANSWER = "The drum turns. It stops at noon."
HELLO = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="Does it turn?")]


def seen(kv) -> str:
    return kv.engine.requests[-1].prompt


def test_metadata_is_the_models(kv_of) -> None:
    kv = kv_of(max_model_len=2048)
    metadata = KVBlendLLM(kv=kv, max_tokens=100).metadata
    assert (metadata.context_window, metadata.num_output) == (2048, 100)
    assert metadata.is_chat_model
    assert metadata.is_function_calling_model
    assert metadata.model_name == "fake-model"
    assert not KVBlendLLM(kv=kv, function_calling=False).metadata.is_function_calling_model
    assert KVBlendLLM(kv=kv).metadata.num_output == 256


def test_complete_goes_through_the_chat_template(kv_of) -> None:
    kv = kv_of(ANSWER)
    response = KVBlendLLM(kv=kv).complete("Does it turn?")
    assert response.text == ANSWER
    assert seen(kv) == "<|im_start|>user\nDoes it turn?<|im_end|>\n<|im_start|>assistant\n"


def test_formatted_prompts_stand_as_they_are(kv_of) -> None:
    kv = kv_of(ANSWER)
    assert KVBlendLLM(kv=kv).complete("Once upon a time", formatted=True).text == ANSWER
    assert seen(kv) == "Once upon a time"


def test_own_prompts_replace_the_template(kv_of) -> None:
    kv = kv_of(ANSWER)
    llm = KVBlendLLM(
        kv=kv,
        messages_to_prompt=lambda messages: "|".join(str(each.content) for each in messages),
        completion_to_prompt=lambda prompt: f"Q: {prompt} A:",
    )
    assert llm.chat(HELLO).message.content == ANSWER
    assert seen(kv) == "Be brief.|Does it turn?"
    assert llm.complete("turn?").text == ANSWER
    assert seen(kv) == "Q: turn? A:"
    assert "".join(each.delta for each in llm.stream_chat(HELLO)) == ANSWER
    assert seen(kv) == "Be brief.|Does it turn?"


async def test_own_prompts_replace_the_template_async(kv_of) -> None:
    kv = kv_of(ANSWER)
    llm = KVBlendLLM(kv=kv, messages_to_prompt=lambda messages: "M", completion_to_prompt=lambda prompt: "C")
    assert (await llm.achat(HELLO)).message.content == ANSWER
    assert seen(kv) == "M"
    assert (await llm.acomplete("x")).text == ANSWER
    assert seen(kv) == "C"
    assert "".join([each.delta async for each in await llm.astream_chat(HELLO)]) == ANSWER
    assert seen(kv) == "M"
    assert "".join([each.delta async for each in await llm.astream_complete("x")]) == ANSWER
    assert seen(kv) == "C"


def test_a_model_without_template_gets_plain_text(kv_of) -> None:
    tokenizer = WordTokenizer()
    tokenizer.chat_template = ""
    kv = kv_of(ANSWER, tokenizer=tokenizer)
    llm = KVBlendLLM(kv=kv)
    assert not llm.metadata.is_chat_model
    assert not llm.metadata.is_function_calling_model
    assert llm.complete("Once").text == ANSWER
    assert seen(kv) == "Once"
    assert llm.chat(HELLO).message.content == ANSWER
    assert seen(kv).startswith("system: Be brief.")
    assert llm.predict(PromptTemplate("Tell of {what}."), what="drums") == ANSWER
    assert seen(kv) == "Tell of drums."


def test_chat(kv_of) -> None:
    kv = kv_of(ANSWER)
    response = KVBlendLLM(kv=kv).chat(HELLO)
    assert response.message.role == MessageRole.ASSISTANT
    assert response.message.content == ANSWER
    assert seen(kv).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nDoes it turn?<|im_end|>")
    assert json.loads(response.model_dump_json())["message"]["blocks"][0]["text"] == ANSWER


def check_stream(responses, content) -> None:
    so_far = ""
    for response in responses:
        so_far += response.delta
        assert content(response) == so_far
    assert so_far == ANSWER
    assert len(responses) > 4
    assert all("report" not in each.raw for each in responses[:-1])
    assert isinstance(responses[-1].raw["report"], BlendReport)
    assert responses[-1].additional_kwargs["completion_tokens"] > 4


def test_streams_are_incremental_in_delta_and_cumulative_in_text(kv_of) -> None:
    llm = KVBlendLLM(kv=kv_of(ANSWER))
    check_stream(list(llm.stream_chat(HELLO)), lambda each: each.message.content)
    check_stream(list(llm.stream_complete("turn?")), lambda each: each.text)
    check_stream(list(llm.stream_complete("turn?", formatted=True)), lambda each: each.text)


async def test_async_forms(kv_of) -> None:
    llm = KVBlendLLM(kv=kv_of(ANSWER))
    assert (await llm.achat(HELLO)).message.content == ANSWER
    assert (await llm.acomplete("turn?")).text == ANSWER
    assert (await llm.acomplete("turn?", formatted=True)).text == ANSWER
    check_stream([each async for each in await llm.astream_chat(HELLO)], lambda each: each.message.content)
    check_stream([each async for each in await llm.astream_complete("turn?")], lambda each: each.text)
    check_stream([each async for each in await llm.astream_complete("x", formatted=True)], lambda each: each.text)


async def test_blocking_forms_work_inside_a_running_loop(kv_of) -> None:
    llm = KVBlendLLM(kv=kv_of(ANSWER))
    assert llm.complete("turn?").text == ANSWER
    assert "".join(each.delta for each in llm.stream_complete("turn?")) == ANSWER


def test_usage_and_report(kv_of, documents) -> None:
    kv = kv_of(ANSWER)
    text = documents[0].text
    kv.ingest([text], progress=False)
    response = KVBlendLLM(kv=kv).complete(f"Context:\n\n{text}\n\nWhat of it?")
    usage, report = response.additional_kwargs, response.raw["report"]
    assert usage["prompt_tokens"] == report.prompt_tokens == len(response.raw["prompt_token_ids"])
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["cached_tokens"] == report.cached_tokens + report.reused_tokens > 0
    assert response.raw["usage"] == usage
    assert response.raw["finish_reason"] == "stop"
    assert response.raw["model"] == "fake-model"
    assert "reused_tokens" in response.model_dump_json()


def test_sampling_settings_and_those_of_one_request(kv_of) -> None:
    kv = kv_of(ANSWER)
    llm = KVBlendLLM(
        kv=kv,
        temperature=0.5,
        top_p=0.9,
        seed=7,
        stop="noon",
        max_tokens=20,
        additional_kwargs={"presence_penalty": 0.1},
        blend={"ratio": 0.3},
        template={"enable_thinking": False},
    )
    assert llm.complete("turn?").text == "The drum turns. It stops at "
    settings = kv.engine.requests[-1].params.settings
    assert (settings.temperature, settings.top_p, settings.seed, settings.max_tokens) == (0.5, 0.9, 7, 20)
    assert settings.presence_penalty == 0.1
    assert kv.engine.requests[-1].options["ratio"] == 0.3
    response = llm.complete(
        "turn?", temperature=0, max_tokens=2, stop=["x"], blend={"blend": False}, top_p=None, timeout=60
    )
    settings = kv.engine.requests[-1].params.settings
    assert (settings.temperature, settings.top_p, settings.max_tokens, settings.stop) == (0, 0.9, 2, ("x",))
    assert kv.engine.requests[-1].options["blend"] is False
    assert kv.engine.requests[-1].options["ratio"] == 0.3
    assert response.raw["finish_reason"] == "length"


def test_the_answers_form(kv_of) -> None:
    kv = kv_of('{"a": 1}')
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "A", "schema": schema}}
    KVBlendLLM(kv=kv).chat(HELLO, response_format=form)
    assert kv.engine.requests[-1].params.settings.json_schema == schema


def test_logprobs(kv_of) -> None:
    response = KVBlendLLM(kv=kv_of(ANSWER)).chat(HELLO, logprobs=True, top_logprobs=1)
    assert "".join(token[0].token for token in response.logprobs) == ANSWER
    assert response.logprobs[0][0].logprob == -0.25


def test_reasoning(kv_of) -> None:
    raw = "<think>It is noon.</think>It stops."
    kv = kv_of([raw], tokenizer=WordTokenizer(thinking=True))
    llm = KVBlendLLM(kv=kv)
    response = llm.chat(HELLO)
    assert response.message.content == "It stops."
    assert [each.content for each in response.message.blocks if isinstance(each, ThinkingBlock)] == ["It is noon."]
    streamed = list(llm.stream_chat(HELLO))
    assert "".join(each.additional_kwargs.get("thinking_delta", "") for each in streamed) == "It is noon."
    assert "".join(each.delta for each in streamed) == "It stops."


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (ChatMessage(role="chatbot", content="a"), {"role": "assistant", "content": "a"}),
        (ChatMessage(role="model", content="a"), {"role": "assistant", "content": "a"}),
        (
            ChatMessage(role="user", blocks=[TextBlock(text="a"), CachePoint(cache_control={"type": "ephemeral"})]),
            {"role": "user", "content": "a"},
        ),
        (
            ChatMessage(role="user", blocks=[TextBlock(text="a"), TextBlock(text="b")]),
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ),
        (
            ChatMessage(
                role="assistant", blocks=[ToolCallBlock(tool_call_id="1", tool_name="f", tool_kwargs={"x": 1})]
            ),
            {
                "role": "assistant",
                "content": [],
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
            },
        ),
        (
            ChatMessage(
                role="assistant",
                content="",
                additional_kwargs={
                    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
                },
            ),
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
        ),
        (
            ChatMessage(role="tool", content="r", additional_kwargs={"tool_call_id": "1", "name": "f"}),
            {"role": "tool", "content": "r", "tool_call_id": "1", "name": "f"},
        ),
        (
            ChatMessage(role="function", content="r", additional_kwargs={"name": "f"}),
            {"role": "tool", "content": "r", "name": "f"},
        ),
        (
            ChatMessage(role="assistant", blocks=[ThinkingBlock(content="hm"), TextBlock(text="a")]),
            {"role": "assistant", "content": "a", "reasoning_content": "hm"},
        ),
    ],
)
def test_messages_of_every_form(message, expected) -> None:
    assert as_openai(message) == expected


def test_what_can_not_be_answered_is_an_error_that_says_why(kv_of) -> None:
    kv = kv_of(ANSWER, max_model_len=64, delay=0.05)
    llm = KVBlendLLM(kv=kv)
    with pytest.raises(PromptTooLong):
        llm.complete("word " * 100)
    with pytest.raises(PromptTooLong):
        list(llm.stream_complete("word " * 100))
    with pytest.raises(ConfigError, match="image"):
        llm.chat([ChatMessage(role="user", blocks=[TextBlock(text="a"), ImageBlock(url="http://localhost/a.png")])])
    with pytest.raises(ConfigError, match="temperature"):
        llm.complete("a", temprature=1)
    with pytest.raises(ConfigError, match="ratio"):
        llm.complete("a", blend={"ration": 1})
    with pytest.raises(ConfigError, match="leave n out"):
        llm.complete("a", n=2)
    with pytest.raises(RequestTimeout):
        llm.complete("a", timeout=0.1)
    assert llm.complete("a").text == ANSWER


def test_system_prompt_and_tokenizer(kv_of) -> None:
    kv = kv_of(ANSWER)
    llm = KVBlendLLM(kv=kv, system_prompt="You know drums.")
    assert llm.predict(PromptTemplate("Tell of {what}."), what="drums") == ANSWER
    assert seen(kv).startswith("<|im_start|>system\nYou know drums.<|im_end|>")
    assert len(llm.tokenizer("The drum turns.")) == 4


def test_dictionary_of_the_model_holds_its_settings(kv_of) -> None:
    llm = KVBlendLLM(kv=kv_of(), temperature=0, max_tokens=5)
    assert llm.to_dict()["class_name"] == "KVBlendLLM"
    assert llm.to_dict()["max_tokens"] == 5
    known = {"class_name": "KVBlendLLM", "model_name": "fake-model", "temperature": 0, "max_tokens": 5}
    assert llm.to_payload() == known
