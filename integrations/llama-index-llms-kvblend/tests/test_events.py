from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler, TokenCountingHandler
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.prompts import PromptTemplate
from llama_index.llms.kvblend import KVBlendLLM, watch_answers

from kvblend_rag.report import BlendReport

HELLO = [ChatMessage(role="user", content="Does it turn?")]
ANSWER = "The drum turns at noon."


class Collector(BaseEventHandler):
    events: list[Any] = []  # noqa: RUF012 (a pydantic field)

    def handle(self, event: Any, **_: Any) -> None:
        self.events.append(event)

    @property
    def names(self) -> list[str]:
        return [type(event).__name__ for event in self.events]


@pytest.fixture
def collector() -> Iterator[Collector]:
    handler = Collector()
    dispatcher = get_dispatcher()
    dispatcher.add_event_handler(handler)
    yield handler
    dispatcher.event_handlers.remove(handler)


def test_chat_events(kv_of, collector) -> None:
    KVBlendLLM(kv=kv_of(ANSWER)).chat(HELLO)
    assert collector.names == ["LLMChatStartEvent", "LLMChatEndEvent"]
    assert collector.events[0].model_dict["class_name"] == "KVBlendLLM"
    assert isinstance(collector.events[1].response.raw["report"], BlendReport)
    collector.events[1].model_dump_json()


def test_completion_events(kv_of, collector) -> None:
    KVBlendLLM(kv=kv_of(ANSWER)).complete("turn?")
    assert collector.names == ["LLMCompletionStartEvent", "LLMCompletionEndEvent"]
    assert collector.events[1].response.text == ANSWER


def test_each_token_is_seen_once(kv_of, collector) -> None:
    llm = KVBlendLLM(kv=kv_of(ANSWER))
    list(llm.stream_chat(HELLO))
    assert (collector.names[0], collector.names[-1]) == ("LLMChatStartEvent", "LLMChatEndEvent")
    assert "".join(each.response.delta for each in collector.events[1:-1]) == ANSWER
    collector.events.clear()
    list(llm.stream_complete("turn?"))
    assert (collector.names[0], collector.names[-1]) == ("LLMCompletionStartEvent", "LLMCompletionEndEvent")
    assert "".join(each.response.delta for each in collector.events[1:-1]) == ANSWER


async def test_async_events(kv_of, collector) -> None:
    llm = KVBlendLLM(kv=kv_of(ANSWER))
    await llm.achat(HELLO)
    await llm.acomplete("turn?")
    assert collector.names == [
        "LLMChatStartEvent", "LLMChatEndEvent", "LLMCompletionStartEvent", "LLMCompletionEndEvent",
    ]  # fmt: skip
    collector.events.clear()
    async for _ in await llm.astream_chat(HELLO):
        pass
    assert "".join(each.response.delta for each in collector.events[1:-1]) == ANSWER
    assert collector.names[-1] == "LLMChatEndEvent"
    collector.events.clear()
    async for _ in await llm.astream_complete("turn?"):
        pass
    assert collector.names[-1] == "LLMCompletionEndEvent"


def test_prediction_events(kv_of, collector) -> None:
    KVBlendLLM(kv=kv_of(ANSWER)).predict(PromptTemplate("{what}?"), what="turn")
    assert collector.names == ["LLMPredictStartEvent", "LLMChatStartEvent", "LLMChatEndEvent", "LLMPredictEndEvent"]


def test_events_do_not_wait_for_an_engine_to_start(kv_of) -> None:
    llm = KVBlendLLM(model="nowhere")
    assert llm.to_payload()["model_name"] == "nowhere"
    assert not llm.kv.started
    llm.close()


def test_callbacks(kv_of) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    llm = KVBlendLLM(kv=kv_of(ANSWER), callback_manager=CallbackManager([debug]))
    llm.chat(HELLO)
    list(llm.stream_complete("turn?"))
    chat, completion = debug.get_event_pairs(CBEventType.LLM)
    assert chat[1].payload[EventPayload.RESPONSE].message.content == ANSWER
    assert completion[1].payload[EventPayload.COMPLETION].text == ANSWER


def test_a_failure_reaches_the_callbacks(kv_of) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    llm = KVBlendLLM(kv=kv_of([RuntimeError("broken")]), callback_manager=CallbackManager([debug]))
    with pytest.raises(RuntimeError, match="broken"):
        llm.chat(HELLO)
    ((_, end),) = debug.get_event_pairs(CBEventType.LLM)
    assert str(end.payload[EventPayload.EXCEPTION]) == "broken"


def test_token_counting_takes_the_engines_numbers(kv_of) -> None:
    counter = TokenCountingHandler()
    llm = KVBlendLLM(kv=kv_of(ANSWER), callback_manager=CallbackManager([counter]))
    usage = llm.chat(HELLO).additional_kwargs
    assert counter.prompt_llm_token_count == usage["prompt_tokens"]
    assert counter.completion_llm_token_count == usage["completion_tokens"]


def test_watching_ends(kv_of) -> None:
    llm = KVBlendLLM(kv=kv_of(ANSWER))
    before = len(get_dispatcher().event_handlers)
    with watch_answers() as answers:
        llm.chat(HELLO)
        list(llm.stream_complete("turn?"))
    llm.chat(HELLO)
    assert len(answers) == 2
    assert len(get_dispatcher().event_handlers) == before
