"""What the frameworks make of a retrieved chunk in a prompt: all but two of its tokens are reused, or it is said why.

One row for each way in which LangChain and LlamaIndex write chunks, for a byte-pair tokenizer and for a
SentencePiece-like one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from langchain.agents import create_agent
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.tools import create_retriever_tool, tool
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_kvblend import ChatKVBlend
from langchain_kvblend import KVBlendVectorStore as LangChainStore
from llama_index.core import Document as SourceDocument
from llama_index.core import MockEmbedding, SimpleDirectoryReader, StorageContext, VectorStoreIndex
from llama_index.core.schema import MetadataMode
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.llms.kvblend import KVBlendLLM
from llama_index.llms.kvblend import KVBlendVectorStore as LlamaIndexStore

from kvblend_rag import KVBlend, which_found
from kvblend_rag.demo.library import load_documents
from kvblend_rag.errors import KVBlendWarning
from kvblend_rag.testing import fake_kvblend, trained_tokenizer

TOP_K = 3
QUESTION = "How often is the drum cleaned?"
CHATML = """{%- if tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ 'user' if message.role == 'tool' else message.role }}
{% if message.role == 'tool' %}<tool_response>
{{ RESULT }}
</tool_response>{% else %}{{ message.content }}{% endif %}{% for call in message.tool_calls or [] %}
<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SEARCH = "<tool_call>\n" + json.dumps({"name": "search", "arguments": {"query": QUESTION}}) + "\n</tool_call>"
PLAIN = PromptTemplate.from_template("{page_content}")
TITLED = PromptTemplate.from_template("Source: {source}\nContent: {page_content}")


@pytest.fixture(autouse=True)
def _own_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """LlamaIndex's tokenizer is global, and a code block of the docs sets it to that of an engine since closed."""
    monkeypatch.setattr("llama_index.core.global_tokenizer", None)


class Texts(NamedTuple):
    """The texts of the documents, and a folder to write them to."""

    texts: dict[str, str]
    folder: Path


# Each row asks its framework the question, and returns what was retrieved, as it is stored.


def langchain_store(kv: KVBlend, given: Texts, document_prompt: Any = None) -> LangChainStore:
    store = LangChainStore(
        InMemoryVectorStore(DeterministicFakeEmbedding(size=32)), kv, document_prompt=document_prompt
    )
    store.add_documents([Document(text, metadata={"source": name}) for name, text in given.texts.items()])
    return store


def langchain_chain(document_prompt: Any) -> Callable[[KVBlend, Texts], Sequence[str]]:
    def ask(kv: KVBlend, given: Texts) -> Sequence[str]:
        prompt = ChatPromptTemplate.from_messages([("system", "Context: {context}"), ("human", "{input}")])
        more = {"document_prompt": document_prompt} if document_prompt else {}
        chain = create_retrieval_chain(
            langchain_store(kv, given, document_prompt).as_retriever(search_kwargs={"k": TOP_K}),
            create_stuff_documents_chain(ChatKVBlend(kv=kv), prompt, **more),
        )
        found = chain.invoke({"input": QUESTION})["context"]
        write = (
            (lambda each: TITLED.format(page_content=each.page_content, **each.metadata)) if document_prompt else None
        )
        return [write(each) if write else each.page_content for each in found]

    return ask


def langchain_retriever_tool(kv: KVBlend, given: Texts) -> Sequence[str]:
    store = langchain_store(kv, given)
    search = create_retriever_tool(store.as_retriever(search_kwargs={"k": TOP_K}), "search", "Search the documents.")
    create_agent(ChatKVBlend(kv=kv), [search]).invoke({"messages": [("user", QUESTION)]})
    return [each.page_content for each in store.store.similarity_search(QUESTION, k=TOP_K)]


def langchain_agent_tutorial(kv: KVBlend, given: Texts) -> Sequence[str]:
    store = langchain_store(kv, given)

    @tool("search", response_format="content_and_artifact")
    def retrieve_context(query: str):
        """Retrieve information to help answer a query."""
        retrieved_docs = store.similarity_search(query, k=TOP_K)
        serialized = "\n\n".join(f"Source: {doc.metadata}\nContent: {doc.page_content}" for doc in retrieved_docs)
        return serialized, retrieved_docs

    result = create_agent(ChatKVBlend(kv=kv), [retrieve_context]).invoke({"messages": [("user", QUESTION)]})
    return [each.page_content for each in result["messages"][2].artifact]


def llama_index(kv: KVBlend, documents: Sequence[Any]) -> VectorStoreIndex:
    storage = StorageContext.from_defaults(vector_store=LlamaIndexStore(SimpleVectorStore(), kv))
    return VectorStoreIndex.from_documents(documents, storage_context=storage, embed_model=MockEmbedding(8))


def sources(response: Any) -> list[str]:
    return [each.node.get_content(MetadataMode.LLM).strip() for each in response.source_nodes]


def llama_index_query(mode: str) -> Callable[[KVBlend, Texts], Sequence[str]]:
    def ask(kv: KVBlend, given: Texts) -> Sequence[str]:
        documents = [SourceDocument(text=text, metadata={"title": name}) for name, text in given.texts.items()]
        index = llama_index(kv, documents)
        return sources(
            index.as_query_engine(llm=KVBlendLLM(kv=kv), response_mode=mode, similarity_top_k=TOP_K).query(QUESTION)
        )

    return ask


def llama_index_files(kv: KVBlend, given: Texts) -> Sequence[str]:
    for place, text in enumerate(given.texts.values()):
        (given.folder / f"{place}.txt").write_text(text, encoding="utf-8")
    index = llama_index(kv, SimpleDirectoryReader(str(given.folder)).load_data())
    found = sources(index.as_query_engine(llm=KVBlendLLM(kv=kv), similarity_top_k=TOP_K).query(QUESTION))
    assert all(text.startswith("file_path: ") for text in found)
    return found


def llama_index_chat(kv: KVBlend, given: Texts) -> Sequence[str]:
    documents = [SourceDocument(text=text) for text in given.texts.values()]
    engine = llama_index(kv, documents).as_chat_engine(
        chat_mode="condense_plus_context", llm=KVBlendLLM(kv=kv), similarity_top_k=TOP_K
    )
    found = sources(engine.chat(QUESTION))
    assert "  " + found[0][:40] in kv.engine.requests[-1].prompt
    return found


ROWS = {
    "LangChain stuff chain": langchain_chain(None),
    "LangChain stuff chain with a document_prompt": langchain_chain(TITLED),
    "LangChain create_retriever_tool": langchain_retriever_tool,
    "LangChain agent tutorial": langchain_agent_tutorial,
    "LlamaIndex compact": llama_index_query("compact"),
    "LlamaIndex compact, SimpleDirectoryReader": llama_index_files,
    "LlamaIndex tree_summarize": llama_index_query("tree_summarize"),
    "LlamaIndex refine": llama_index_query("refine"),
    "LlamaIndex condense_plus_context": llama_index_chat,
}


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    sections = [each for each in load_documents() if len(each.text.split()) >= 40]
    return {each.title: each.text for each in sections[:12]}


@pytest.fixture(params=["byte-pair", "sentencepiece"])
def kv_of(request: pytest.FixtureRequest, texts: dict[str, str], tmp_path: Path):
    made = []

    def make(result: str = "message.content") -> KVBlend:
        tokenizer = trained_tokenizer(request.param, list(texts.values()), CHATML.replace("RESULT", result))
        kv = fake_kvblend(
            lambda asked: SEARCH if '"search"' in asked.prompt and "<tool_response>" not in asked.prompt else "Weekly.",
            tokenizer=tokenizer,
            store_path=tmp_path / "store",
            max_model_len=16_384,
        )
        made.append(kv)
        return kv

    yield make
    for kv in made:
        kv.close()


@pytest.fixture
def given(texts: dict[str, str], tmp_path: Path) -> Texts:
    folder = tmp_path / "files"
    folder.mkdir()
    return Texts(texts, folder)


@pytest.mark.parametrize("row", ROWS)
def test_all_but_two_tokens_of_each_chunk_are_reused(kv_of, given, row) -> None:
    kv = kv_of()
    retrieved = ROWS[row](kv, given)
    assert len(retrieved) == TOP_K
    for text in retrieved:
        assert kv.cut(text)
        for key, chunk in kv.cut(text):
            reused = max(
                sum(use.tokens for use in request.report.chunks if use.key == key) for request in kv.engine.requests
            )
            assert reused >= len(chunk) - 2, f"{reused} of {len(chunk)} tokens of {text!r}"


def test_where_a_template_escapes_a_warning_says_so(kv_of, given) -> None:
    kv = kv_of(result="message.content | tojson")
    given = Texts({name: text.replace(". ", ".\n") for name, text in given.texts.items()}, given.folder)
    with pytest.warns(KVBlendWarning, match="escapes the newlines in tools' results"):
        retrieved = ROWS["LangChain create_retriever_tool"](kv, given)
    asked = kv.engine.requests[-1]
    uses = which_found(kv, asked.report, retrieved, asked.prompt_token_ids)
    assert any(use.found != "fully" for use in uses)
    assert all(use.found == "fully" or use.reason == "escaped by the chat template" for use in uses)
