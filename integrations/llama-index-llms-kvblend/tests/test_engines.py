"""Query and chat engines and agents: of each retrieved chunk, all but two tokens are reused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llama_index.core import SimpleDirectoryReader, StorageContext, VectorStoreIndex
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.tools import RetrieverTool
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.llms.kvblend import KVBlendLLM, KVBlendVectorStore, found_nodes, watch_answers

from kvblend_rag.errors import KVBlendWarning
from kvblend_rag.testing import WordTokenizer

QUESTION = "How is the drum cleaned, and how often?"
NODES = 3


def index_of(kv, documents) -> VectorStoreIndex:
    storage = StorageContext.from_defaults(vector_store=KVBlendVectorStore(SimpleVectorStore(), kv))
    return VectorStoreIndex.from_documents(documents, storage_context=storage)


@pytest.fixture(params=["byte-pair", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Any]) -> Any:
    return tokenizers[request.param]


@pytest.fixture(scope="session")
def documents(documents) -> list[Any]:
    return documents[:12]


@pytest.fixture
def kv(kv_of, tokenizer) -> Any:
    return kv_of("It is cleaned weekly.", tokenizer=tokenizer, max_model_len=16_384)


def assert_reused(kv, answers, nodes) -> None:
    """Every node's chunks, but for a token at each end of each."""
    assert len(nodes) >= 2
    for node, use in zip(nodes, found_nodes(kv, answers, nodes), strict=True):
        chunks = kv.cut(node.get_content("llm").strip())
        assert use.of == sum(len(tokens) for _, tokens in chunks) > 40
        assert use.found == "fully", (node.node_id, use)
        # Refining, a prompt may begin as the last one did: the prefix cache has that part, and it is not computed.
        assert use.tokens >= use.of - 2 * len(chunks)
        if use.reason != "taken from the exact prefix cache":
            assert use.reused >= use.of - 2 * len(chunks), (node.node_id, use, answers[0].raw["report"])


@pytest.mark.parametrize("mode", ["compact", "tree_summarize", "refine", "compact_accumulate", "accumulate"])
def test_query_engines(kv, documents, mode) -> None:
    engine = index_of(kv, documents).as_query_engine(llm=KVBlendLLM(kv=kv), response_mode=mode, similarity_top_k=NODES)
    with watch_answers() as answers:
        response = engine.query(QUESTION)
    assert "weekly" in str(response)
    assert len(answers) == (NODES if mode in ("refine", "accumulate") else 1)
    assert_reused(kv, answers, response.source_nodes)


@pytest.mark.parametrize("mode", ["compact", "tree_summarize"])
async def test_query_engines_async(kv, documents, mode) -> None:
    engine = index_of(kv, documents).as_query_engine(llm=KVBlendLLM(kv=kv), response_mode=mode, similarity_top_k=NODES)
    with watch_answers() as answers:
        response = await engine.aquery(QUESTION)
    assert_reused(kv, answers, response.source_nodes)


def test_streaming_query_engine(kv, documents) -> None:
    engine = index_of(kv, documents).as_query_engine(llm=KVBlendLLM(kv=kv), streaming=True, similarity_top_k=NODES)
    with watch_answers() as answers:
        response = engine.query(QUESTION)
        assert "".join(response.response_gen) == "It is cleaned weekly."
    assert_reused(kv, answers, response.source_nodes)


@pytest.mark.parametrize("mode", ["context", "condense_plus_context"])
def test_chat_engines(kv, documents, mode) -> None:
    engine = index_of(kv, documents).as_chat_engine(
        chat_mode=mode, llm=KVBlendLLM(kv=kv), similarity_top_k=NODES, system_prompt="You know the machines."
    )
    with watch_answers() as answers:
        response = engine.chat(QUESTION)
    assert_reused(kv, answers, response.source_nodes)
    with watch_answers() as answers:
        streamed = engine.stream_chat("And the cooling tray?")
        assert "weekly" in "".join(streamed.response_gen)
    assert [use.found for use in found_nodes(kv, answers, streamed.source_nodes)] == ["fully"] * NODES


def test_files_of_a_folder(kv, documents, tmp_path) -> None:
    for place, document in enumerate(documents[:6]):
        (tmp_path / f"{place}.txt").write_text(document.text, encoding="utf-8")
    files = SimpleDirectoryReader(str(tmp_path), required_exts=[".txt"]).load_data()
    engine = index_of(kv, files).as_query_engine(llm=KVBlendLLM(kv=kv), similarity_top_k=NODES)
    with watch_answers() as answers:
        response = engine.query(QUESTION)
    assert "file_path: " in kv.engine.requests[-1].prompt
    assert_reused(kv, answers, response.source_nodes)


SEARCH = "<tool_call>\n" + json.dumps({"name": "search", "arguments": {"input": QUESTION}}) + "\n</tool_call>"


async def agent_asked(kv_of, documents, tokenizer) -> tuple[Any, Any, Any]:
    kv = kv_of([SEARCH, "Weekly."], tokenizer=tokenizer, max_model_len=16_384)
    retriever = index_of(kv, documents).as_retriever(similarity_top_k=NODES)
    tool = RetrieverTool.from_defaults(retriever, name="search", description="Search the manual.")
    with watch_answers() as answers:
        output = await FunctionAgent(tools=[tool], llm=KVBlendLLM(kv=kv)).run(QUESTION)
    assert str(output) == "Weekly."
    return kv, answers, output.tool_calls[0].tool_output.raw_output


@pytest.mark.parametrize("dummy_space", [False, True])
async def test_an_agents_retriever_tool(kv_of, documents, dummy_space) -> None:
    assert_reused(*await agent_asked(kv_of, documents, WordTokenizer(dummy_space=dummy_space)))


async def test_an_agents_retriever_tool_behind_a_template_that_escapes(kv_of, documents) -> None:
    with pytest.warns(KVBlendWarning, match="escapes the newlines"):
        kv, answers, nodes = await agent_asked(kv_of, documents, WordTokenizer(escape_results=True))
    assert answers[-1].raw["warnings"] == ["tool_results_escaped"]
    reasons = {use.reason for use in found_nodes(kv, answers, nodes) if use.found != "fully"}
    assert reasons == {"escaped by the chat template"}


def test_ten_large_nodes_are_not_cut_when_the_context_holds_them(kv_of, documents) -> None:
    kv = kv_of("Weekly.", max_model_len=32_768)
    engine = index_of(kv, documents).as_query_engine(llm=KVBlendLLM(kv=kv), similarity_top_k=10)
    with watch_answers() as answers:
        response = engine.query(QUESTION)
    assert len(answers) == 1
    assert_reused(kv, answers, response.source_nodes)


def test_a_small_context_cuts_nodes_and_the_reason_says_so(kv_of, documents) -> None:
    kv = kv_of("Weekly.", max_model_len=900)
    engine = index_of(kv, documents).as_query_engine(
        llm=KVBlendLLM(kv=kv, max_tokens=50), similarity_top_k=8, response_mode="tree_summarize"
    )
    with watch_answers() as answers:
        response = engine.query(QUESTION)
    uses = found_nodes(kv, answers, response.source_nodes)
    assert {use.reason for use in uses if use.found != "fully"} <= {"cut by the splitter", "not in the prompt"}


def test_what_was_never_ingested_is_named(kv_of, documents) -> None:
    kv = kv_of("Weekly.", max_model_len=16_384)
    engine = VectorStoreIndex.from_documents(documents).as_query_engine(llm=KVBlendLLM(kv=kv))
    with watch_answers() as answers:
        response = engine.query(QUESTION)
    assert {use.reason for use in found_nodes(kv, answers, response.source_nodes)} == {"not ingested"}
    assert {use.reused for use in found_nodes(kv, answers[0], response.source_nodes)} == {0}
    with pytest.raises(ValueError, match="KVBlendLLM"):
        found_nodes(kv, [], response.source_nodes)
