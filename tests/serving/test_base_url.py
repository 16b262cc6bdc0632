"""The package's own classes on a running server: the same answers and the same report as on an engine of one's own."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("vllm")
pytest.importorskip("openai")

import httpx

from kvblend_rag import KVBlend
from kvblend_rag.chat import Chat
from kvblend_rag.conversation.sampling import Sampling
from kvblend_rag.documents import DocumentSync, which_found
from kvblend_rag.errors import ConfigError, EngineUnavailable, RequestTimeout

pytestmark = [pytest.mark.full, pytest.mark.timeout(1200)]

TEXTS = [
    f"Record {i}. " + " ".join(f"On page {i}{j} the clerk wrote down name {j}." for j in range(14)) for i in range(3)
]
GREEDY = {"temperature": 0, "max_tokens": 8}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}


def url(server) -> str:
    return f"{server.url}/v1"


@pytest.fixture
def kv(server):
    with KVBlend.from_config(base_url=url(server), model=server.model, api_key=server.key) as kv:
        yield kv


@pytest.fixture
def stored(kv):
    report = kv.ingest(TEXTS, document_ids=[f"r{i}" for i in range(3)], progress=False)
    assert report.chunks == report.computed + report.present == 3
    return kv


def conversation(start, *texts):
    return [{"role": "user", "content": "\n\n".join([start, *texts, "Whose name is it?"])}]


def test_ingest_release_and_prefetch(kv):
    texts = [f"Temporary {text}" for text in TEXTS]
    report = kv.ingest(texts, document_ids=["t0", "t1", "t2"], progress=False)
    assert (report.computed, report.skipped) == (3, ())
    assert kv.ingest(texts, document_ids=["t0", "t1", "t2"], progress=False).present == 3
    assert kv.prefetch(texts[:2]) == 2
    assert kv.prefetch(document_ids=["t2"]) == 1
    (key, _), *_ = kv.cut(texts[0])
    assert kv.catalogue.chunks_of(["t0"])["t0"] == [key]
    assert kv.ingest(["too short"], document_ids=["s"], progress=False).skipped[0][0] == 0
    assert kv.replace([texts[1]], document_ids=["t0"], progress=False).present == 1
    assert kv.release(["t0", "t1", "t2"]) == 2


def test_a_sync_of_documents(kv):
    with DocumentSync(kv, namespace="of-a-test") as sync:
        texts = [f"Synced {text}" for text in TEXTS]
        assert sync.add(["a", "b", "c"], texts, groups=["g", "g", "h"]).computed == 3
        assert sync.prefetch(ids=["a", "b"]) == 2
        assert sync.delete(groups=["g"]) == 2
        assert sync.clear() == 1


def test_a_turn_whole_and_streamed(stored):
    chat = Chat(stored)
    whole = chat.complete_sync(conversation("Whole.", *TEXTS), sampling=GREEDY)
    assert whole.report.blended
    assert len(whole.report.chunks) == 3
    assert whole.usage.cache_read == whole.report.cached_tokens + whole.report.reused_tokens > 300
    assert whole.usage.input_tokens == whole.report.prompt_tokens == len(whole.prompt_token_ids)
    assert whole.usage.output_tokens == 8
    deltas = list(chat.stream_sync(conversation("Whole.", *TEXTS), sampling=GREEDY))
    assert "".join(each.text for each in deltas) == whole.text
    last = deltas[-1]
    assert last.report.prompt_tokens == whole.report.prompt_tokens
    assert last.usage == last.usage.__class__(
        input_tokens=whole.usage.input_tokens,
        output_tokens=8,
        cache_read=last.report.cached_tokens + last.report.reused_tokens,
    )
    assert [each.finish_reason for each in deltas if each.finish_reason] == ["length"]


def test_a_text_and_its_log_probabilities(stored):
    chat = Chat(stored)
    text = "\n\n".join(["Continue.", *TEXTS[::-1], "And so"])
    settings = {**GREEDY, "logprobs": True, "top_logprobs": 3}
    whole = chat.complete_text_sync(text, sampling=settings)
    assert whole.report.blended
    tokens = whole.generations[0].logprobs
    assert len(tokens) == 8
    assert all(each.logprob <= 0 and len(each.top) >= 3 for each in tokens)
    assert all(each.logprob == pytest.approx(max(top for _, top in each.top)) for each in tokens)
    assert chat.complete_text_sync(text, sampling={"temperature": 0}, blend={"blend": False}).report.blended is False


def test_options_sampling_and_several_answers(stored):
    chat = Chat(stored)
    off = chat.complete_sync(conversation("Off.", *TEXTS), sampling=GREEDY, blend={"blend": False})
    assert off.report.reason == "the request asked for an ordinary prefill"
    exact = chat.complete_sync(conversation("E.", *TEXTS), sampling=GREEDY, blend={"selector": "everything"})
    assert exact.report.reused_tokens == 0 < exact.report.recomputed_tokens
    several = chat.complete_sync(
        conversation("Several.", *TEXTS), sampling=Sampling(n=2, max_tokens=4, temperature=1.0, top_k=20, seed=1)
    )
    assert len(several.generations) == 2
    formed = chat.complete_sync(conversation("Formed."), sampling={**GREEDY, "regex": "(yes|no)"})
    assert formed.text in ("yes", "no")


def test_a_forced_tool_call(stored):
    chat = Chat(stored)
    # Between the tokens of a call blanks are allowed, and greedily a random model would write nothing else.
    settings = {"max_tokens": 900, "temperature": 2.0, "seed": 1}
    schema = {**TOOL["function"]["parameters"], "properties": {"a": {"type": "integer", "enum": [7]}}}
    tool = {"type": "function", "function": {**TOOL["function"], "parameters": schema}}
    called = chat.complete_sync(conversation("Call."), tools=[tool], tool_choice="add", sampling=settings)
    assert [(call.name, "".join(call.arguments.split())) for call in called.tool_calls] == [("add", '{"a":7}')], called
    deltas = list(chat.stream_sync(conversation("Call."), tools=[tool], tool_choice="add", sampling=settings))
    parts = [call for delta in deltas for call in delta.tool_calls]
    assert parts[0].name == "add"
    assert "".join("".join(part.arguments for part in parts).split()) == '{"a":7}'


def test_found_documents(stored):
    result = Chat(stored).complete_sync(conversation("Found.", TEXTS[0], TEXTS[2]), sampling=GREEDY)
    uses = which_found(stored, result.report, TEXTS, result.prompt_token_ids)
    assert [use.found for use in uses] == ["fully", "not", "fully"]
    assert uses[0].reused > 50


def test_langchain(server, stored):
    from langchain_kvblend import ChatKVBlend, KVBlendLLM

    llm = ChatKVBlend(base_url=url(server), api_key=server.key, model=server.model, temperature=0, max_tokens=8)
    assert server.key not in repr(llm) + str(llm._identifying_params)
    answer = llm.invoke(conversation("Chain.", *TEXTS)[0]["content"])
    report = answer.response_metadata["blend_report"]
    assert report["blended"]
    assert len(report["chunks"]) == 3
    assert answer.usage_metadata["input_token_details"]["cache_read"] > 300
    streamed = list(llm.stream(conversation("Chain.", *TEXTS)[0]["content"]))
    assert "".join(str(part.content) for part in streamed) == answer.content
    plain = KVBlendLLM(base_url=url(server), api_key=server.key, model=server.model, temperature=0, max_tokens=8)
    assert isinstance(plain.invoke("\n\n".join(["Plain.", *TEXTS])), str)
    llm.close()
    plain.close()


def test_llama_index(server, stored):
    from llama_index.llms.kvblend import KVBlendLLM

    llm = KVBlendLLM(server.model, base_url=url(server), api_key=server.key, temperature=0, max_tokens=8)
    asked = conversation("Index.", *TEXTS)[0]["content"]
    answer = llm.complete(asked)
    assert answer.raw["report"].blended
    assert llm.metadata.context_window == 1536
    assert [part.text for part in llm.stream_complete(asked)][-1] == answer.text
    llm.close()


def test_what_can_go_wrong_is_said_in_one_sentence(server, stored):
    chat = Chat(stored)
    with pytest.raises(ConfigError, match="does not accept this API key"):
        KVBlend.from_config(base_url=url(server), api_key="wrong").engine  # noqa: B018
    with pytest.raises(ConfigError, match=f"serves {server.model}, not other"):
        KVBlend.from_config(base_url=url(server), api_key=server.key, model="other").engine  # noqa: B018
    with pytest.raises(EngineUnavailable, match="can't be reached"):
        KVBlend.from_config(base_url="http://127.0.0.1:9/v1").engine  # noqa: B018
    with pytest.raises(Exception, match=r"does not fit|maximum"):
        chat.complete_sync(conversation("Long.", *(TEXTS * 8)), sampling=GREEDY)
    with pytest.raises(ConfigError, match="max_risk is judged beside the engine"):
        chat.complete_sync(conversation("Risk."), blend={"max_risk": 0.5})
    with pytest.raises(ConfigError, match="engine_args"):
        KVBlend.from_config(base_url=url(server), engine_args={"max_model_len": 5}).engine  # noqa: B018
    with pytest.raises(RequestTimeout):
        chat.complete_sync(conversation("Slow."), sampling={"max_tokens": 900, "temperature": 0}, timeout=0.2)


def test_leaving_a_stream_frees_the_request(server, stored):
    endless = {"max_tokens": 900, "extra": {"ignore_eos": True}}
    deltas = Chat(stored).stream_sync(conversation("Left.", *TEXTS), sampling=endless)
    next(deltas)
    deltas.close()
    end = time.monotonic() + 30
    while "vllm:num_requests_running" in (shown := httpx.get(f"{server.url}/metrics").text):
        running = [
            float(line.split()[-1]) for line in shown.splitlines() if line.startswith("vllm:num_requests_running")
        ]
        if not any(running):
            break
        assert time.monotonic() < end
        time.sleep(0.2)
