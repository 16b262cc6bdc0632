"""The bundled reader in vLLM, on a CPU."""

from __future__ import annotations

import asyncio

import pytest
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import Document
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.llms.kvblend import KVBlendLLM, KVBlendVectorStore, found_nodes, watch_answers
from pydantic import BaseModel, Field

HELLO = [ChatMessage(role="user", content="Name three colours.")]


@pytest.fixture
def llm(reader) -> KVBlendLLM:
    return KVBlendLLM(kv=reader, temperature=0, max_tokens=6)


def test_every_form_gives_the_same_answer(llm, reader) -> None:
    assert llm.metadata.context_window == 2048
    assert llm.metadata.is_chat_model
    answer = llm.chat(HELLO).message.content
    assert answer
    assert llm.complete(HELLO[0].content).text == answer
    streamed = list(llm.stream_chat(HELLO))
    assert "".join(each.delta for each in streamed) == streamed[-1].message.content == answer
    assert len(streamed) >= 3

    async def together() -> list[str]:
        async def stream() -> str:
            return "".join([each.delta async for each in await llm.astream_chat(HELLO)])

        return await asyncio.gather(stream(), stream())

    assert asyncio.run(together()) == [answer, answer]
    usage = streamed[-1].additional_kwargs
    assert usage["prompt_tokens"] == len(reader.engine.render([{"role": "user", "content": HELLO[0].content}]))
    assert 0 < usage["completion_tokens"] <= 6


def test_a_left_stream_frees_its_request(llm) -> None:
    async def leave() -> int:
        stream = await llm.astream_complete("Tell a long story.", max_tokens=500)
        async for _ in stream:
            break
        await stream.aclose()
        del stream
        for _ in range(200):
            left = llm.kv.engine._llm.output_processor.get_num_unfinished_requests()
            if not left:
                break
            await asyncio.sleep(0.05)
        return left

    assert asyncio.run(leave()) == 0


def test_query_engine_reuses_what_it_retrieves(llm, reader, documents) -> None:
    short = [Document(text=" ".join(each.text.split()[:100]), metadata=each.metadata) for each in documents[:4]]
    vectors = KVBlendVectorStore(SimpleVectorStore(), reader)
    storage = StorageContext.from_defaults(vector_store=vectors)
    index = VectorStoreIndex.from_documents(short, storage_context=storage)
    with watch_answers() as answers:
        response = index.as_query_engine(llm=llm).query("Why are my beans roasted unevenly?")
    assert str(response)
    uses = found_nodes(llm, answers, response.source_nodes)
    assert [use.found for use in uses] == ["fully", "fully"]
    report = answers[0].raw["report"]
    assert report.blended
    assert all(use.reused >= 0.9 * use.of for use in uses)
    assert answers[0].additional_kwargs["cached_tokens"] == report.cached_tokens + report.reused_tokens
    before = reader.catalogue.stats()["chunks"]
    for document in short:
        index.delete_ref_doc(document.doc_id)
    vectors.flush()
    assert reader.catalogue.stats()["chunks"] < before


class Machine(BaseModel):
    """A coffee roasting machine."""

    name: str = Field(max_length=20)
    drums: int = Field(ge=1, le=9)


def test_structured_prediction_always_validates(llm) -> None:
    prompt = PromptTemplate("The Fennick 3 has two drums. Describe it.")
    assert isinstance(llm.structured_predict(Machine, prompt, llm_kwargs={"max_tokens": 60}), Machine)
    objects = list(llm.stream_structured_predict(Machine, prompt, llm_kwargs={"max_tokens": 60}))
    assert isinstance(objects[-1], Machine)
    assert len(objects) > 3
