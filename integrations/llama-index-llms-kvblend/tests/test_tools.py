"""Tools, agents and structured prediction; scripted answers in Hermes syntax, read by vLLM's own parsers too."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import ChatMessage, ToolCallBlock
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.kvblend import KVBlendLLM, found_nodes, watch_answers
from pydantic import BaseModel

from kvblend_rag.errors import KVBlendWarning
from kvblend_rag.testing import WordTokenizer


def roast(bean: str, minutes: int = 10) -> str:
    """Roast beans for some minutes."""
    return f"{bean} roasted for {minutes} minutes."


def price(bean: str) -> str:
    """The price of a bean."""
    return f"{bean} costs 3."


TOOLS = [FunctionTool.from_defaults(roast), FunctionTool.from_defaults(price)]


def call(tool: str, **arguments: Any) -> str:
    return "<tool_call>\n" + json.dumps({"name": tool, "arguments": arguments}) + "\n</tool_call>"


@pytest.fixture(params=["plain", "vllm"])
def parsers(request: pytest.FixtureRequest) -> str:
    return request.param


def test_chat_with_tools(kv_of, parsers) -> None:
    kv = kv_of("Let me see. " + call("roast", bean="Kenya", minutes=12), parsers=parsers)
    llm = KVBlendLLM(kv=kv)
    assert isinstance(llm, FunctionCallingLLM)
    response = llm.chat_with_tools(TOOLS, user_msg="Roast Kenya.", chat_history=[ChatMessage(content="Hi.")])
    (selected,) = llm.get_tool_calls_from_response(response)
    assert (selected.tool_name, selected.tool_kwargs) == ("roast", {"bean": "Kenya", "minutes": 12})
    assert selected.tool_id
    assert response.message.content.strip() == "Let me see."
    assert response.raw["finish_reason"] == "tool_calls"
    assert [block.tool_name for block in response.message.blocks if isinstance(block, ToolCallBlock)] == ["roast"]
    prompt = kv.engine.requests[-1].prompt
    assert "Roast beans for some minutes." in prompt
    assert "user\nHi.<|im_end|>\n<|im_start|>user\nRoast Kenya." in prompt
    json.loads(response.model_dump_json())


def test_streamed_calls_grow(kv_of, parsers) -> None:
    llm = KVBlendLLM(kv=kv_of(call("roast", bean="Kenya", minutes=12), parsers=parsers))
    responses = list(llm.stream_chat_with_tools(TOOLS, user_msg="Roast Kenya."))
    for response in responses:
        llm.get_tool_calls_from_response(response, error_on_no_tool_call=False)
    (selected,) = llm.get_tool_calls_from_response(responses[-1])
    assert selected.tool_kwargs == {"bean": "Kenya", "minutes": 12}


async def test_async_forms(kv_of, parsers) -> None:
    llm = KVBlendLLM(kv=kv_of(call("price", bean="Kenya"), parsers=parsers))
    response = await llm.achat_with_tools(TOOLS, user_msg="Price?")
    assert llm.get_tool_calls_from_response(response)[0].tool_name == "price"
    last = None
    async for response in await llm.astream_chat_with_tools(TOOLS, user_msg="Price?"):
        last = response
    assert llm.get_tool_calls_from_response(last)[0].tool_kwargs == {"bean": "Kenya"}
    assert str(await llm.apredict_and_call(TOOLS, user_msg="Price?")) == "Kenya costs 3."


def test_parallel_calls(kv_of, parsers) -> None:
    both = call("roast", bean="Kenya") + "\n" + call("price", bean="Kenya")
    llm = KVBlendLLM(kv=kv_of(both, parsers=parsers))
    response = llm.chat_with_tools(TOOLS, user_msg="Do.", allow_parallel_tool_calls=True)
    assert [each.tool_name for each in llm.get_tool_calls_from_response(response)] == ["roast", "price"]
    assert len({each.tool_id for each in llm.get_tool_calls_from_response(response)}) == 2
    response = llm.chat_with_tools(TOOLS, user_msg="Do.")
    assert [each.tool_name for each in llm.get_tool_calls_from_response(response)] == ["roast"]


def test_required_and_named_tools_are_constrained(kv_of) -> None:
    kv = kv_of(call("price", bean="Kenya"), parsers="vllm")
    llm = KVBlendLLM(kv=kv)

    def form() -> str:
        return str(kv.engine.requests[-1].params.structured_outputs)

    llm.chat_with_tools(TOOLS, user_msg="Do.")
    assert '"at_least_one": true' not in form()
    llm.chat_with_tools(TOOLS, user_msg="Do.", tool_required=True)
    assert '"at_least_one": true' in form()
    llm.chat_with_tools(TOOLS, user_msg="Do.", tool_choice="price")
    assert "price" in form()
    assert "roast" not in form()
    llm.chat_with_tools([], user_msg="Do.", tool_required=True)
    assert kv.engine.requests[-1].params.structured_outputs is None


def test_no_call_is_an_error_only_when_asked_for(kv_of) -> None:
    llm = KVBlendLLM(kv=kv_of("I would rather not."))
    response = llm.chat_with_tools(TOOLS, user_msg="Roast.")
    assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []
    with pytest.raises(ValueError, match="rather not"):
        llm.get_tool_calls_from_response(response)


@pytest.mark.parametrize("streaming", [True, False])
async def test_function_agent(kv_of, parsers, streaming) -> None:
    kv = kv_of([call("roast", bean="Kenya", minutes=12), "It is done."], parsers=parsers)
    llm = KVBlendLLM(kv=kv)
    agent = FunctionAgent(tools=TOOLS, llm=llm, streaming=streaming, system_prompt="You roast.")
    memory = ChatMemoryBuffer.from_defaults(llm=llm)
    output = await agent.run("Roast Kenya.", memory=memory)
    assert str(output) == "It is done."
    assert [each.tool_output.content for each in output.tool_calls] == ["Kenya roasted for 12 minutes."]
    prompt = kv.engine.requests[1].prompt
    assert "<tool_response>\nKenya roasted for 12 minutes.\n</tool_response>" in prompt
    assert '"name": "roast"' in prompt.split("Roast Kenya.")[1]
    await agent.run("Again.", memory=memory)
    assert "It is done." in kv.engine.requests[2].prompt
    assert "Kenya roasted" in kv.engine.requests[2].prompt


@pytest.mark.parametrize("parallel", [True, False])
async def test_agent_finds_chunks_in_a_tools_result(kv_of, documents, parallel) -> None:
    found = "\n\n".join(each.text for each in documents[:2])
    tool = FunctionTool.from_defaults(lambda query: found, name="search", description="Search the manual.")
    kv = kv_of([call("search", query="drum"), "It turns."], max_model_len=8192)
    kv.ingest([each.text for each in documents[:2]], progress=False)
    agent = FunctionAgent(tools=[tool], llm=KVBlendLLM(kv=kv), allow_parallel_tool_calls=parallel)
    with watch_answers() as answers:
        await agent.run("Does it turn?")
    assert len(answers) == 2
    assert [use.found for use in found_nodes(kv, answers, list(documents[:2]))] != ["not", "not"]


async def test_a_template_that_escapes_results_is_warned_of(kv_of) -> None:
    kv = kv_of([call("price", bean="Kenya"), "It costs 3."], tokenizer=WordTokenizer(escape_results=True))
    agent = FunctionAgent(tools=TOOLS, llm=KVBlendLLM(kv=kv))
    with pytest.warns(KVBlendWarning, match="escapes"):
        output = await agent.run("Price?")
    assert output.raw["warnings"] == ["tool_results_escaped"]


class Bean(BaseModel):
    """A bean."""

    name: str
    grams: int


PROMPT = PromptTemplate("Name a bean from {place}.")
FORCED = json.dumps([{"name": "Bean", "parameters": {"name": "Kenya", "grams": 60}}])


def test_structured_prediction(kv_of, parsers) -> None:
    native = parsers == "vllm"
    kv = kv_of(call("Bean", name="Kenya", grams=60) if native else FORCED, parsers=parsers)
    llm = KVBlendLLM(kv=kv)
    assert llm.structured_predict(Bean, PROMPT, place="Kenya") == Bean(name="Kenya", grams=60)
    if native:
        assert kv.engine.requests[-1].params.structured_outputs is not None
    assert llm.as_structured_llm(Bean).complete("A bean.").raw == Bean(name="Kenya", grams=60)


async def test_structured_prediction_async(kv_of) -> None:
    llm = KVBlendLLM(kv=kv_of(FORCED))
    assert await llm.astructured_predict(Bean, PROMPT, place="Kenya") == Bean(name="Kenya", grams=60)
    objects = [each async for each in await llm.astream_structured_predict(Bean, PROMPT, place="Kenya")]
    assert objects[-1] == Bean(name="Kenya", grams=60)
    assert list(llm.stream_structured_predict(Bean, PROMPT, place="Kenya"))[-1] == Bean(name="Kenya", grams=60)


def test_structured_prediction_streams_partial_objects(kv_of) -> None:
    kv = kv_of(call("Bean", name="Kenya", grams=60), parsers="vllm")
    objects = list(KVBlendLLM(kv=kv).stream_structured_predict(Bean, PROMPT, place="Kenya"))
    assert objects[-1] == Bean(name="Kenya", grams=60)
    assert '"at_least_one": true' in str(kv.engine.requests[-1].params.structured_outputs)


def test_structured_prediction_by_text(kv_of) -> None:
    llm = KVBlendLLM(kv=kv_of('{"name": "Kenya", "grams": 60}'), function_calling=False)
    assert llm.structured_predict(Bean, PROMPT, place="Kenya") == Bean(name="Kenya", grams=60)
