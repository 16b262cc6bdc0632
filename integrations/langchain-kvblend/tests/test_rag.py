"""The tutorials' shapes, and what of the chunks in their prompts is reused.

With a byte-pair tokenizer and with a SentencePiece-like one, and the real matching.
"""

from __future__ import annotations

import json
import warnings

import pytest
from langchain.agents import create_agent
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.tools import create_retriever_tool, tool
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_kvblend import ChatKVBlend, KVBlendVectorStore
from langchain_text_splitters import RecursiveCharacterTextSplitter

from kvblend_rag.demo.library import load_documents
from kvblend_rag.errors import KVBlendWarning
from kvblend_rag.testing import trained_tokenizer

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
QUESTION = "How often is the drum cleaned?"


@pytest.fixture(scope="module")
def documents():
    """The bundled documents as a splitter leaves them."""
    whole = [Document(each.text, metadata={"source": each.id}) for each in load_documents()]
    return RecursiveCharacterTextSplitter(chunk_size=600, chunk_overlap=80).split_documents(whole)[:40]


@pytest.fixture(scope="module", params=["byte-pair", "sentencepiece"])
def tokenizer(request, documents):
    texts = [each.page_content for each in documents]
    return trained_tokenizer(request.param, texts, CHATML.replace("RESULT", "message.content"))


@pytest.fixture
def rag(make_kv, tokenizer):
    """``rag(answers, documents, ...)``: a model, and a store that holds documents."""

    def make(answers, documents, document_prompt=None):
        kv = make_kv(answers, tokenizer=tokenizer, max_model_len=8192)
        plain = InMemoryVectorStore(DeterministicFakeEmbedding(size=32))
        store = KVBlendVectorStore(plain, kv, document_prompt=document_prompt)
        store.add_documents(documents)
        return ChatKVBlend(kv=kv, temperature=0), store

    return make


def reused(kv, report, text):
    """Asserts that all but two tokens of each of a text's chunks are reused."""
    found = {}
    for use in report["chunks"]:
        found[use["key"]] = found.get(use["key"], 0) + use["tokens"]
    pieces = kv.cut(text)
    assert pieces
    for key, chunk in pieces:
        assert found.get(key, 0) >= len(chunk) - 2, f"{found.get(key, 0)} of {len(chunk)} tokens of {text!r}"


class Reports:
    """The model's answers, as a callback sees them."""

    def __init__(self):
        from langchain_core.callbacks import BaseCallbackHandler

        outer = self
        self.messages = []

        class Handler(BaseCallbackHandler):
            def on_llm_end(self, response, **kwargs):
                outer.messages.append(response.generations[0][0].message)

        self.config = {"callbacks": [Handler()]}

    @property
    def last(self):
        return self.messages[-1].response_metadata["blend_report"]


PLAIN = None
TITLED = PromptTemplate.from_template("Source: {source}\nContent: {page_content}")


@pytest.mark.parametrize(
    ("in_store", "in_chain"),
    [(PLAIN, PLAIN), (TITLED, TITLED), (PLAIN, TITLED)],
    ids=["page content", "document_prompt", "document_prompt only in the chain"],
)
def test_the_retrieval_chain_tutorial(rag, documents, in_store, in_chain):
    llm, store = rag("Every week.", documents, in_store)
    prompt = ChatPromptTemplate.from_messages(
        [("system", "Answer from the context.\n\nContext: {context}"), ("human", "{input}")]
    )
    more = {} if in_chain is None else {"document_prompt": in_chain}
    chain = create_retrieval_chain(
        store.as_retriever(search_kwargs={"k": 5}), create_stuff_documents_chain(llm, prompt, **more)
    )
    seen = Reports()
    result = chain.invoke({"input": QUESTION}, seen.config)
    assert result["answer"] == "Every week."
    assert len(result["context"]) == 5
    for document in result["context"]:
        text = (
            document.page_content
            if in_store is None
            else in_store.invoke(document.metadata | {"page_content": document.page_content}).text
        )
        reused(llm.kv, seen.last, text)
    uses = llm.found_documents(seen.messages[-1], result["context"], in_store)
    assert {use.found for use in uses} == {"fully"}
    assert [use.reason for use in uses] == [None] * 5
    assert [arguments for method, arguments in llm.kv.engine.calls if method == "prefetch"]


def test_the_retrieval_chain_streams(rag, documents):
    llm, store = rag("Every single week.", documents)
    prompt = ChatPromptTemplate.from_template("{context}\n\nQuestion: {input}")
    chain = create_retrieval_chain(store.as_retriever(), create_stuff_documents_chain(llm, prompt))
    pieces = [each["answer"] for each in chain.stream({"input": QUESTION}) if "answer" in each]
    assert "".join(pieces) == "Every single week."
    assert len(pieces) > 2


def tool_answers(name):
    """Calls the tool, then answers."""
    asked = json.dumps({"name": name, "arguments": {"query": QUESTION}})
    return [f"<tool_call>\n{asked}\n</tool_call>", "Every week."]


def test_the_agent_with_a_retriever_tool(rag, documents):
    llm, store = rag(tool_answers("search"), documents)
    search = create_retriever_tool(store.as_retriever(search_kwargs={"k": 5}), "search", "Search the documents.")
    agent = create_agent(llm, [search])
    seen = Reports()
    result = agent.invoke({"messages": [{"role": "user", "content": QUESTION}]}, seen.config)
    kinds = [message.type for message in result["messages"]]
    assert kinds == ["human", "ai", "tool", "ai"]
    assert result["messages"][1].tool_calls[0]["args"] == {"query": QUESTION}
    assert result["messages"][-1].content == "Every week."
    given = store.store.similarity_search(QUESTION, k=5)
    for document in given:
        assert document.page_content in result["messages"][2].content
        reused(llm.kv, seen.last, document.page_content)
    assert {use.found for use in llm.found_documents(result["messages"][-1], given)} == {"fully"}


async def test_the_agent_of_the_rag_tutorial(rag, documents):
    llm, store = rag(tool_answers("retrieve_context"), documents)

    @tool(response_format="content_and_artifact")
    def retrieve_context(query: str):
        """Retrieve information to help answer a query."""
        retrieved_docs = store.similarity_search(query, k=2)
        serialized = "\n\n".join(f"Source: {doc.metadata}\nContent: {doc.page_content}" for doc in retrieved_docs)
        return serialized, retrieved_docs

    agent = create_agent(llm, [retrieve_context], system_prompt="You have a tool that retrieves from a manual.")
    seen = Reports()
    result = await agent.ainvoke({"messages": [("user", QUESTION)]}, seen.config)
    retrieved = result["messages"][2].artifact
    assert len(retrieved) == 2
    for document in retrieved:
        reused(llm.kv, seen.last, document.page_content)


async def test_the_agent_streams(rag, documents):
    llm, store = rag(tool_answers("search"), documents)
    agent = create_agent(llm, [create_retriever_tool(store.as_retriever(), "search", "Search the documents.")])
    text = ""
    async for message, _ in agent.astream({"messages": [("user", QUESTION)]}, stream_mode="messages"):
        if message.type == "AIMessageChunk":
            text += message.text
    assert text == "Every week."


def test_an_agent_that_answers_in_a_form(make_kv, documents):
    """It calls its tool all the same: the constraint is a call or the form."""
    import xgrammar
    from pydantic import BaseModel

    class Interval(BaseModel):
        """How often."""

        days: int

    answers = [tool_answers("search")[0], '{"days": 7}']
    kv = make_kv(list(answers), parsers="vllm", max_model_len=8192)
    store = KVBlendVectorStore.from_documents(documents, DeterministicFakeEmbedding(size=32), kv=kv)
    search = create_retriever_tool(store.as_retriever(), "search", "Search the documents.")
    agent = create_agent(ChatKVBlend(kv=kv), [search], response_format=Interval)
    result = agent.invoke({"messages": [("user", QUESTION)]})
    assert result["structured_response"] == Interval(days=7)
    assert result["messages"][2].type == "tool"
    forms = [request.params.structured_outputs for request in kv.engine.requests]
    assert len(forms) == 2
    for form, answer in zip(forms, answers, strict=True):
        grammar = xgrammar.Grammar.from_structural_tag(form.structural_tag)
        assert xgrammar.testing._is_grammar_accept_string(grammar, answer)
        assert not xgrammar.testing._is_grammar_accept_string(grammar, "Just text.")


def test_a_template_that_escapes_is_named(rag, documents, tokenizer):
    llm, store = rag(tool_answers("search"), documents)
    tokenizer_before = tokenizer.chat_template
    tokenizer.chat_template = CHATML.replace("RESULT", "message.content | tojson")
    try:
        agent = create_agent(llm, [create_retriever_tool(store.as_retriever(), "search", "Search the documents.")])
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            result = agent.invoke({"messages": [("user", QUESTION)]})
    finally:
        tokenizer.chat_template = tokenizer_before
    assert any(issubclass(each.category, KVBlendWarning) for each in given)
    answer = result["messages"][-1]
    assert answer.response_metadata["blend_warnings"] == ["tool_results_escaped"]
    lines = [each for each in store.store.similarity_search(QUESTION) if "\n" in each.page_content]
    for use in llm.found_documents(answer, lines):
        assert use.found == "fully" or use.reason == "escaped by the chat template"


def test_the_five_lines_batch_and_order(rag, documents):
    llm, store = rag("Fine.", documents)
    given = documents[:4]
    for order in (given, given[::-1]):
        answer = llm.invoke("Context:\n\n" + "\n\n".join(each.page_content for each in order) + "\n\nQuestion: why?")
        report = answer.response_metadata["blend_report"]
        uses = llm.found_documents(answer, order)
        assert {use.found for use in uses} == {"fully"}
        assert answer.usage_metadata["input_token_details"]["cache_read"] > 0.8 * report["prompt_tokens"]
        llm.kv.engine.run(llm.kv.engine.reset_prefix_cache())
    assert len(store.similarity_search("x")) == 4
