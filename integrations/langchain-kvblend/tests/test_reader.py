"""The whole way on the real engine: the bundled reader answers from the bundled documents."""

from __future__ import annotations

import asyncio
from typing import Literal

import pytest
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_kvblend import ChatKVBlend, KVBlendLLM, KVBlendVectorStore
from pydantic import BaseModel, Field

from kvblend_rag.demo.library import load_documents


@pytest.fixture(scope="module")
def store(reader_kv):
    documents = [Document(each.text, id=each.id) for each in load_documents()[:6]]
    store = KVBlendVectorStore(InMemoryVectorStore(DeterministicFakeEmbedding(size=32)), reader_kv)
    store.add_documents(documents)
    return store


def test_a_retrieval_chain_reuses_its_chunks(reader_kv, store):
    llm = ChatKVBlend(kv=reader_kv, temperature=0, max_tokens=16)
    messages = []
    prompt = ChatPromptTemplate.from_messages([("system", "Answer briefly.\n\n{context}"), ("human", "{input}")])
    model = llm | (lambda message: messages.append(message) or message)
    chain = create_retrieval_chain(
        store.as_retriever(search_kwargs={"k": 3}), create_stuff_documents_chain(model, prompt)
    )
    result = chain.invoke({"input": "How long is the warranty?"})
    assert result["answer"]
    uses = llm.found_documents(messages[0], result["context"])
    assert [use.found for use in uses] == ["fully"] * 3
    assert all(use.reused >= use.of - 2 * -(-use.of // 256) for use in uses)
    usage, report = messages[0].usage_metadata, messages[0].response_metadata["blend_report"]
    assert report["blended"]
    assert usage["input_token_details"]["cache_read"] == report["cached_tokens"] + report["reused_tokens"]
    assert usage["input_token_details"]["cache_read"] > usage["input_tokens"] / 3
    plain = llm.invoke("How long is the warranty?", blend={"blend": False})
    assert not plain.response_metadata["blend_report"]["blended"]


async def test_two_streams_at_once_and_one_that_is_left(reader_kv):
    llm = ChatKVBlend(kv=reader_kv, temperature=0, max_tokens=12)

    async def read(question):
        return "".join([chunk.content async for chunk in llm.astream(question)])

    stream = ChatKVBlend(kv=reader_kv, max_tokens=1500).astream("Write without an end.")
    await anext(stream)
    await stream.aclose()
    one, two = await asyncio.gather(read("What is a drum?"), read("What is a filter?"))
    assert one
    assert two
    assert one == await read("What is a drum?")


def test_a_form_is_always_kept(reader_kv):
    class Machine(BaseModel):
        name: str = Field(max_length=12)
        kilograms: int = Field(ge=1, le=99)

    llm = ChatKVBlend(kv=reader_kv, temperature=0, max_tokens=64)
    for method in ("json_schema", "function_calling"):
        llm_with = llm.with_structured_output(Machine, method=method, include_raw=True)
        answer = llm_with.invoke("Describe a roasting machine.")
        assert isinstance(answer["parsed"], Machine), answer


def test_a_forced_call_is_made(reader_kv):
    @tool
    def set_drum(minutes: Literal[5, 10], direction: Literal["left", "right"]) -> str:
        """Turn the drum."""
        return ""

    @tool
    def stop() -> str:
        """Stop the machine."""
        return ""

    llm = ChatKVBlend(kv=reader_kv, temperature=0, max_tokens=64)
    for choice in ("any", "set_drum"):
        answer = llm.bind_tools([set_drum, stop], tool_choice=choice, parallel_tool_calls=False).invoke("Turn it left.")
        (made,) = answer.tool_calls
        if choice == "set_drum" or made["name"] == "set_drum":
            assert made["name"] == "set_drum"
            set_drum.args_schema.model_validate(made["args"])


def test_plain_completions_and_log_probabilities(reader_kv):
    result = KVBlendLLM(kv=reader_kv, temperature=0, max_tokens=4, logprobs=True).generate(["Once upon a", "One two"])
    for (generation,) in result.generations:
        tokens = generation.generation_info["logprobs"]["content"]
        assert "".join(each["token"] for each in tokens) == generation.text
        assert all(each["logprob"] <= 0 for each in tokens)
