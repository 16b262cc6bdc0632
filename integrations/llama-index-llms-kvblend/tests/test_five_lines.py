"""LlamaIndex's five lines with FAISS, only the model and the store replaced."""

from __future__ import annotations

import faiss
import pytest
from llama_index.core import Settings, SimpleDirectoryReader, StorageContext, VectorStoreIndex
from llama_index.llms.kvblend import KVBlendLLM, KVBlendVectorStore, found_nodes, watch_answers
from llama_index.vector_stores.faiss import FaissMapVectorStore


@pytest.fixture
def folder(documents, tmp_path):
    for place, document in enumerate(documents[:8]):
        (tmp_path / f"{place}.md").write_text(f"# {document.metadata['title']}\n\n{document.text}", encoding="utf-8")
    return str(tmp_path)


def test_five_lines(kv_of, folder, embeddings) -> None:
    kv = kv_of("The drum turns.", max_model_len=16_384)
    faiss_index = faiss.IndexIDMap2(faiss.IndexFlatL2(embeddings.dimensions))

    Settings.llm = KVBlendLLM(kv=kv)
    docs = SimpleDirectoryReader(folder, required_exts=[".md"]).load_data()
    vectors = KVBlendVectorStore(FaissMapVectorStore(faiss_index), kv)
    index = VectorStoreIndex.from_documents(docs, storage_context=StorageContext.from_defaults(vector_store=vectors))
    with watch_answers() as answers:
        response = index.as_query_engine().query("Does the drum turn?")

    assert str(response) == "The drum turns."
    assert kv.engine.ingested > 0
    assert [use.found for use in found_nodes(kv, answers, response.source_nodes)] == ["fully", "fully"]
    assert answers[0].additional_kwargs["cached_tokens"] > 0.5 * answers[0].additional_kwargs["prompt_tokens"]
    vectors.delete_nodes([node.node_id for node in response.source_nodes])
    vectors.flush()
    assert "not ingested" in {use.reason for use in found_nodes(kv, answers, response.source_nodes)}


def test_the_models_tokenizer_counts(kv_of, folder) -> None:
    kv = kv_of("The drum turns.", max_model_len=16_384)
    Settings.llm = llm = KVBlendLLM(kv=kv)
    Settings.tokenizer = llm.tokenizer
    index = VectorStoreIndex.from_documents(SimpleDirectoryReader(folder, required_exts=[".md"]).load_data())
    assert str(index.as_query_engine().query("Does the drum turn?")) == "The drum turns."
