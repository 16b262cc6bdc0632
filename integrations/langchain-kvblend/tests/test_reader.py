"""The whole way on the real engine: the bundled reader answers from the bundled documents."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Literal

import pytest
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.indexing import InMemoryRecordManager, index
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
        pieces = list(llm.with_structured_output(Machine, method=method).stream("Describe a roasting machine."))
        assert isinstance(pieces[-1], Machine)


def test_index_follows_what_becomes_of_documents(reader_kv, tmp_path):
    """Twice, edited, deleted: on the real engine, with files that really go."""
    manager = InMemoryRecordManager("reader")
    manager.create_schema()
    store = KVBlendVectorStore(InMemoryVectorStore(DeterministicFakeEmbedding(size=32)), reader_kv, namespace="index")
    folder = Path(reader_kv.config.store_path)
    texts = [each.text for each in load_documents()[20:24]]

    def run(texts):
        documents = [Document(text, metadata={"source": str(place)}) for place, text in enumerate(texts)]
        done = index(documents, manager, store, cleanup="full", source_id_key="source", key_encoder="sha256")
        return done["num_added"], done["num_deleted"], reader_kv.catalogue.stats()["chunks"], files()

    def files():
        return len([path for path in folder.rglob("*") if path.is_file() and path.suffix == ".safetensors"])

    before, chunks = files(), reader_kv.catalogue.stats()["chunks"]
    first = run(texts)
    assert first[:2] == (4, 0)
    assert first[2] - chunks == first[3] - before >= 4
    assert run(texts) == (0, 0, *first[2:])
    edited = [texts[0] + " One sentence more, at its end.", *texts[1:]]
    assert run(edited)[:2] == (1, 1)
    assert reader_kv.prefetch(edited) == reader_kv.catalogue.stats()["chunks"] - chunks
    last = run(edited[:2])
    assert last[:2] == (0, 2)
    assert last[2] < first[2]
    assert last[3] < first[3]
    llm = ChatKVBlend(kv=reader_kv, temperature=0, max_tokens=4)
    found = store.similarity_search("x", k=2)
    answer = llm.invoke("\n\n".join(each.page_content for each in found) + "\n\nQuestion: what is this?")
    assert {use.found for use in llm.found_documents(answer, found)} == {"fully"}


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
