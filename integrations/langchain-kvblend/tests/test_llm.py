from __future__ import annotations

import asyncio

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.globals import set_llm_cache
from langchain_core.prompts import PromptTemplate
from langchain_kvblend import KVBlendLLM

from kvblend_rag.errors import ConfigError, RequestTimeout

LONG = "one two three four five six seven eight nine ten"


class Tokens(BaseCallbackHandler):
    def __init__(self):
        self.seen, self.ended = [], []

    def on_llm_new_token(self, token, **kwargs):
        self.seen.append(token)

    def on_llm_end(self, response, **kwargs):
        self.ended.append(response)


def test_a_text_is_continued_as_it_stands(make_kv):
    kv = make_kv(LONG)
    llm = KVBlendLLM(kv=kv)
    assert llm.invoke("Once upon a time") == LONG
    assert kv.engine.requests[-1].prompt == "Once upon a time"
    chain = PromptTemplate.from_template("Say {x}") | llm
    assert chain.invoke({"x": "it"}) == LONG
    assert llm._llm_type == "kvblend"
    assert llm._get_ls_params()["ls_provider"] == "kvblend"
    assert llm.get_num_tokens("one two three") == 3


async def test_asynchronously(make_kv):
    llm = KVBlendLLM(kv=make_kv(LONG))
    assert await llm.ainvoke("x") == LONG
    assert [piece async for piece in llm.astream("x")] == list(llm.stream("x"))


def test_settings_of_the_model_and_of_a_call(make_kv):
    kv = make_kv(LONG)
    llm = KVBlendLLM(kv=kv, stop=["three"], temperature=0, max_tokens=50)
    assert llm.invoke("x") == "one two "
    assert llm.invoke("x", stop=["five"]) == "one two three four "
    assert llm.invoke("x", stop=["zzz"], max_tokens=2) == "one two"
    with pytest.raises(ConfigError, match="best_of"):
        llm.invoke("x", best_of=2)
    with pytest.raises(ConfigError, match="tools"):
        llm.invoke("x", tools=[])


def test_n_answers_a_prompt(make_kv):
    llm = KVBlendLLM(kv=make_kv(["a b", "c d", "e f", "g h"]), n=2, logprobs=True)
    result = llm.generate(["one", "two"])
    assert [[each.text for each in given] for given in result.generations] == [["a b", "c d"], ["e f", "g h"]]
    about = result.generations[0][0].generation_info
    assert about["finish_reason"] == "stop"
    assert about["blend_report"]["prompt_tokens"] == 1
    assert about["usage"]["output_tokens"] == 4
    assert [each["token"] for each in about["logprobs"]["content"]] == ["a", " b"]
    assert result.llm_output["token_usage"] == {"prompt_tokens": 2, "completion_tokens": 8, "total_tokens": 10}
    with pytest.raises(ConfigError, match="n must be 1"):
        next(iter(llm.stream("x")))


def test_a_batch_is_one_batch_of_the_engine(make_kv):
    kv = make_kv(lambda request: request.prompt.upper(), delay=0.2)
    llm = KVBlendLLM(kv=kv)
    asked = [f"p{place}" for place in range(32)]
    assert llm.batch(asked) == [each.upper() for each in asked]
    assert kv.engine.peak == 32
    assert asyncio.run(llm.abatch(asked)) == [each.upper() for each in asked]
    assert kv.engine.peak == 32
    llm.batch(asked[:4], {"max_concurrency": 2})


def test_callbacks_see_every_token_once(make_kv):
    llm = KVBlendLLM(kv=make_kv(LONG))
    handler = Tokens()
    pieces = list(llm.stream("x", {"callbacks": [handler]}))
    assert "".join(handler.seen) == "".join(pieces) == LONG
    about = handler.ended[0].generations[0][0].generation_info
    assert about["model_name"] == "fake-model"
    assert about["usage"]["input_tokens"] == 1


async def test_a_stream_that_is_left_frees_its_request(make_kv):
    kv = make_kv(LONG * 20, delay=0.02)
    stream = KVBlendLLM(kv=kv).astream("x")
    await anext(stream)
    await stream.aclose()
    for _ in range(200):
        if kv.engine.aborted:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the request goes on")


def test_retries(make_kv):
    llm = KVBlendLLM(kv=make_kv([RequestTimeout("slow"), "Done."]), max_retries=1, timeout=60)
    assert llm.invoke("x") == "Done."


def test_a_global_cache_never_gives_another_configuration_s_answer(make_kv):
    set_llm_cache(InMemoryCache())
    one, two = make_kv("one"), make_kv("two", model="other")
    assert [KVBlendLLM(kv=kv).invoke("x") for kv in (one, two, one, two)] == ["one", "two", "one", "two"]
    assert len(one.engine.requests) == 1
    for more in ({"temperature": 0.5}, {"stop": ["z"]}, {"max_tokens": 9}, {"blend": {"ratio": 0.5}}):
        before = len(one.engine.requests)
        KVBlendLLM(kv=one, **more).invoke("x")
        assert len(one.engine.requests) == before + 1, more


def test_which_documents_were_found(make_kv, words):
    from langchain_core.documents import Document

    kv = make_kv("Fine.")
    document = Document(words("known"))
    kv.ingest([document.page_content], progress=False)
    llm = KVBlendLLM(kv=kv)
    about = llm.generate([f"Read: {document.page_content} Why?"]).generations[0][0].generation_info
    assert llm.found_documents(about, [document])[0].found == "fully"
