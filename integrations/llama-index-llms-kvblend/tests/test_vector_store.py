from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import Document, MetadataMode, NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryResult,
)
from llama_index.llms.kvblend import KVBlendLLM, KVBlendPrefetch, KVBlendTransform, KVBlendVectorStore

from kvblend_rag.errors import ConfigError, KVBlendWarning, StoreError


class TextStore(BasePydanticVectorStore):
    """A store that keeps texts and lists its nodes, as hosted ones do."""

    stores_text: bool = True
    nodes: dict[str, TextNode] = {}  # noqa: RUF012 (a pydantic field)
    calls: list[str] = []  # noqa: RUF012

    @property
    def client(self) -> Any:
        return "the client"

    def add(self, nodes, **_: Any) -> list[str]:
        self.calls.append("add")
        self.nodes.update({node.node_id: node for node in nodes})
        return [node.node_id for node in nodes]

    def delete(self, ref_doc_id: str, **_: Any) -> None:
        self.calls.append("delete")
        self.nodes = {key: node for key, node in self.nodes.items() if node.ref_doc_id != ref_doc_id}

    def delete_nodes(self, node_ids=None, filters=None, **_: Any) -> None:
        self.calls.append("delete_nodes")
        gone = {node.node_id for node in self.get_nodes(node_ids, filters)}
        self.nodes = {key: node for key, node in self.nodes.items() if key not in gone}

    def get_nodes(self, node_ids=None, filters=None) -> list[TextNode]:
        found = [node for node in self.nodes.values() if node_ids is None or node.node_id in node_ids]
        for each in filters.filters if filters else ():
            assert each.operator == FilterOperator.EQ
            found = [node for node in found if node.metadata.get(each.key) == each.value]
        return found

    def clear(self) -> None:
        self.nodes = {}

    def query(self, query: VectorStoreQuery, **_: Any) -> VectorStoreQueryResult:
        self.calls.append("query")
        nodes = list(self.nodes.values())[: query.similarity_top_k]
        return VectorStoreQueryResult(nodes=nodes, similarities=[1.0] * len(nodes), ids=[n.node_id for n in nodes])


def node(text: str, source: str | None = None, node_id: str | None = None, **metadata: Any) -> TextNode:
    made = TextNode(text=text, metadata=metadata, embedding=[1.0, 0.0], **({"id_": node_id} if node_id else {}))
    if source:
        made.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=source)
    return made


@pytest.fixture
def texts(documents) -> list[str]:
    """Each one chunk of the default size."""
    return [" ".join(each.text.split()[:60]) for each in documents[:8]]


def stored(kv) -> int:
    return kv.catalogue.stats()["chunks"]


def prefetched(kv) -> list[int]:
    return [len(arguments[0]) for name, arguments in kv.engine.calls if name == "prefetch"]


def test_adding_precomputes_what_will_stand_in_the_prompt(kv_of, texts) -> None:
    kv = kv_of()
    store = KVBlendVectorStore(TextStore(), kv)
    one = node(texts[0], "a", title="Drums", secret="x")
    one.excluded_llm_metadata_keys = ["secret"]
    assert store.add([one]) == [one.node_id]
    text = one.get_content(MetadataMode.LLM)
    assert "title: Drums" in text
    assert "secret" not in text
    assert kv.catalogue.missing([key for key, _ in kv.cut(text)]) == []
    assert store.client == "the client"
    assert store.stores_text
    assert store.inner.calls == ["add"]
    assert store.get_nodes([one.node_id]) == [one]


async def test_async_forms(kv_of, texts) -> None:
    kv = kv_of()
    store = KVBlendVectorStore(TextStore(), kv)
    nodes = [node(text, f"source {place}") for place, text in enumerate(texts[:4])]
    await store.async_add(nodes)
    assert stored(kv) == 4
    result = await store.aquery(VectorStoreQuery(similarity_top_k=2))
    assert len(result.nodes) == 2
    assert prefetched(kv) == [2]
    await store.adelete("source 0")
    await store.adelete_nodes([nodes[1].node_id])
    assert [each.ref_doc_id for each in await store.aget_nodes()] == ["source 2", "source 3"]
    store.flush()
    assert stored(kv) == 2
    await store.aclear()
    assert stored(kv) == 0


def test_chunks_stay_as_long_as_any_document_holds_them(kv_of, texts) -> None:
    kv = kv_of()
    store = KVBlendVectorStore(TextStore(), kv)
    store.add([node(texts[0], "a"), node(texts[1], "a"), node(texts[0], "b")])
    assert (stored(kv), kv.engine.ingested) == (2, 2)
    store.delete("a")
    store.flush()
    assert stored(kv) == 1
    store.delete("b")
    store.flush()
    assert stored(kv) == 0


def test_nodes_are_deleted_one_by_one_and_by_filter(kv_of, texts) -> None:
    kv = kv_of()
    store = KVBlendVectorStore(TextStore(), kv)
    nodes = [node(text, "a", kind=place % 2) for place, text in enumerate(texts[:4])]
    store.add(nodes)
    store.delete_nodes([nodes[0].node_id])
    store.flush()
    assert stored(kv) == 3
    store.delete_nodes(filters=MetadataFilters(filters=[MetadataFilter(key="kind", value=1)]))
    store.flush()
    assert stored(kv) == 1
    store.delete("unknown")
    store.delete("a")
    store.flush()
    assert stored(kv) == 0


def test_several_batches_of_one_document_add_up(kv_of, texts) -> None:
    kv = kv_of()
    store = KVBlendVectorStore(TextStore(), kv)
    for text in texts[:3]:
        store.add([node(text, "a")])
    assert stored(kv) == 3
    store.delete("a")
    store.flush()
    assert stored(kv) == 0


def test_an_edited_node_of_the_same_id_is_replaced(kv_of, texts) -> None:
    kv = kv_of()
    store = KVBlendVectorStore(TextStore(), kv)
    store.add([node(texts[0], "a", "the id"), node(texts[1], "a", "another")])
    store.delete("a")
    store.add([node(texts[2], "a", "the id"), node(texts[1], "a", "another")])
    assert (stored(kv), kv.engine.ingested) == (2, 3)
    store.delete_nodes(["the id"])
    store.flush()
    assert stored(kv) == 1


def test_a_node_without_a_source_is_its_own(kv_of, texts) -> None:
    kv = kv_of()
    store = KVBlendVectorStore(TextStore(), kv)
    store.add([node(texts[0], None, "alone")])
    store.delete("alone")
    store.query(VectorStoreQuery())
    assert stored(kv) == 0


def test_another_process_deletes_what_this_one_added(kv_of, texts) -> None:
    kv = kv_of()
    inner = TextStore()
    KVBlendVectorStore(inner, kv).add([node(texts[0], "a"), node(texts[1], "b")])
    later = KVBlendVectorStore(inner, kv)
    later.delete("a")
    later.close()
    assert stored(kv) == 1
    KVBlendVectorStore(inner, kv).clear()
    assert stored(kv) == 0


def test_indexes_over_one_store_are_told_apart(kv_of, texts) -> None:
    kv = kv_of()
    one, two = (KVBlendVectorStore(TextStore(), kv, index=name) for name in ("one", "two"))
    for store in (one, two):
        store.add([node(texts[0], "a")])
    assert kv.engine.ingested == 1
    one.delete("a")
    one.flush()
    assert stored(kv) == 1
    two.clear()
    assert stored(kv) == 0


def test_closing_without_an_engine_starts_none(tmp_path, kv_of, texts, monkeypatch) -> None:
    kv = kv_of()
    KVBlendVectorStore(TextStore(), kv).add([node(texts[0], "a")])
    llm = KVBlendLLM(model="fake-model", settings={"store_path": str(tmp_path / "store")})
    store = KVBlendVectorStore(TextStore(), llm)
    store.delete("a")
    store.close()
    assert not llm.kv.started
    assert stored(kv) == 0
    llm.close()


def test_querying_prefetches(kv_of, texts) -> None:
    kv = kv_of()
    store = KVBlendVectorStore(TextStore(), kv)
    store.add([node(text, "a") for text in texts[:4]])
    assert len(store.query(VectorStoreQuery(similarity_top_k=3)).nodes) == 3
    assert prefetched(kv) == [3]


def test_a_store_that_returns_ids_only_prefetches_by_id(kv_of, documents) -> None:
    kv = kv_of()
    vectors = KVBlendVectorStore(SimpleVectorStore(), kv, index="named")
    index = VectorStoreIndex.from_documents(
        documents[:6], storage_context=StorageContext.from_defaults(vector_store=vectors)
    )
    found = index.as_retriever(similarity_top_k=2).retrieve("drum")
    ((keys,),) = [arguments for name, arguments in kv.engine.calls if name == "prefetch"]
    assert set(keys) == {key for each in found for key, _ in kv.cut(each.get_content(MetadataMode.LLM))}
    before = len(kv.engine.calls)
    engine = index.as_query_engine(llm=KVBlendLLM(kv=kv), node_postprocessors=[KVBlendPrefetch(kv)])
    engine.query("drum")
    assert [name for name, _ in kv.engine.calls[before:]].count("prefetch") == 2


async def test_prefetch_postprocessor_is_async_too_and_never_starts_an_engine(kv_of, documents) -> None:
    kv = kv_of()
    index = VectorStoreIndex.from_documents(documents[:4])
    nodes = await index.as_retriever().aretrieve("drum")
    assert await KVBlendPrefetch(kv).apostprocess_nodes(nodes, query_str="drum") == nodes
    assert len(prefetched(kv)) == 1
    cold = KVBlendLLM(model="nowhere")
    assert KVBlendPrefetch(cold).postprocess_nodes(nodes) == nodes
    assert not cold.kv.started
    cold.close()


def test_background(kv_of, texts) -> None:
    kv = kv_of()
    store = KVBlendVectorStore(TextStore(), kv, background=True, capacity=2)
    store.add([node(text, f"source {place}") for place, text in enumerate(texts[:4])])
    store.delete("source 0")
    report = store.flush()
    assert report.computed == 4
    assert store.pending == 0
    store.flush()
    assert stored(kv) == 3
    store.close()
    store.close()
    assert not [each for each in threading.enumerate() if each.name == "kvblend-documents"]


def test_a_failure_in_the_background_is_raised_by_flush(kv_of, texts, monkeypatch) -> None:
    kv = kv_of()
    store = KVBlendVectorStore(TextStore(), kv, background=True)

    def full(*_: Any, **__: Any) -> None:
        raise StoreError("no space")

    monkeypatch.setattr(kv, "replace", full)
    store.add([node(texts[0], "a")])
    with pytest.raises(StoreError, match="no space"):
        store.flush()
    assert store.inner.calls == ["add"]


def test_a_model_that_can_not_be_blended_is_warned_of_once(kv_of, texts) -> None:
    kv = kv_of(refusal="it has two rotary embeddings")
    store = KVBlendVectorStore(TextStore(), kv)
    with pytest.warns(KVBlendWarning, match="two rotary"):
        store.add([node(texts[0], "a")])
    store.add([node(texts[1], "a")])
    store.delete("a")
    store.flush()
    assert stored(kv) == 0


def test_adopting_an_index(kv_of, documents) -> None:
    index = VectorStoreIndex.from_documents(documents[:6])
    kv = kv_of()
    store = KVBlendVectorStore(index.vector_store, kv)
    report = store.adopt(index, progress=False)
    assert report.computed == report.chunks == kv.engine.ingested > 0
    again = KVBlendVectorStore(index.vector_store, kv).adopt(index.docstore, progress=False)
    assert (again.computed, again.present) == (0, report.computed)
    store.delete(documents[0].doc_id)
    store.flush()
    assert stored(kv) < report.computed


def test_adopting_from_a_store_that_lists_its_nodes(kv_of, texts) -> None:
    inner = TextStore()
    inner.add([node(text, "a") for text in texts])
    kv = kv_of()
    assert KVBlendVectorStore(inner, kv).adopt(progress=False).computed == len(texts)
    assert KVBlendVectorStore(inner, kv).adopt(inner.get_nodes(), progress=False).computed == 0


def test_adopting_goes_on_where_it_stopped(kv_of, texts, monkeypatch) -> None:
    inner = TextStore()
    inner.add([node(f"{text} {place}", "a") for place in range(20) for text in texts])
    kv = kv_of()
    replace, done = kv.replace, []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(replace(*arguments, **options))
        return done[-1]

    monkeypatch.setattr(kv, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        KVBlendVectorStore(inner, kv).adopt(progress=False)
    monkeypatch.undo()
    report = KVBlendVectorStore(inner, kv).adopt(progress=False)
    assert report.present == done[0].computed > 0
    assert report.computed + report.present == report.chunks


def test_adopting_nothing_says_what_to_give(kv_of, documents) -> None:
    store = KVBlendVectorStore(SimpleVectorStore(), kv_of())
    with pytest.raises(ConfigError, match="docstore"):
        store.adopt()
    docstore = SimpleDocumentStore()
    docstore.add_documents(documents[:2])
    with pytest.raises(ConfigError, match="whole documents"):
        store.adopt(docstore)


def test_persisting(kv_of, documents, tmp_path) -> None:
    kv = kv_of()
    storage = StorageContext.from_defaults(vector_store=KVBlendVectorStore(SimpleVectorStore(), kv))
    VectorStoreIndex.from_documents(documents[:3], storage_context=storage)
    storage.persist(str(tmp_path / "index"))
    inner = SimpleVectorStore.from_persist_dir(str(tmp_path / "index"))
    assert len(inner.data.embedding_dict) == len(storage.vector_store.inner.data.embedding_dict) > 0
    assert storage.vector_store.to_dict() == inner.to_dict()


# IngestionPipeline, as its documentation says


def pipeline(kv, embeddings, **options: Any) -> IngestionPipeline:
    return IngestionPipeline(
        transformations=[SentenceSplitter(chunk_size=80, chunk_overlap=0), embeddings],
        docstore=SimpleDocumentStore(),
        vector_store=KVBlendVectorStore(SimpleVectorStore(), kv),
        docstore_strategy=DocstoreStrategy.UPSERTS_AND_DELETE,
        disable_cache=True,
        **options,
    )


@pytest.fixture
def long_documents(documents) -> list[Document]:
    """Documents of several nodes each."""
    parts = [documents[place : place + 3] for place in range(0, 9, 3)]
    joined = ["\n\n".join(each.text for each in part) for part in parts]
    return [Document(text=text, doc_id=f"document {place}") for place, text in enumerate(joined)]


def test_a_second_run_computes_nothing(kv_of, embeddings, long_documents) -> None:
    kv = kv_of()
    made = pipeline(kv, embeddings)
    nodes = made.run(documents=long_documents)
    assert len(nodes) > len(long_documents)
    computed = kv.engine.ingested
    assert computed >= len(nodes)
    assert made.run(documents=copy.deepcopy(long_documents)) == []
    assert kv.engine.ingested == computed
    assert stored(kv) == computed


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_an_edited_document_recomputes_only_its_changed_chunks(
    kv_of, embeddings, long_documents, asynchronous
) -> None:
    kv = kv_of()
    made = pipeline(kv, embeddings)
    nodes = made.run(documents=long_documents)
    computed, before = kv.engine.ingested, stored(kv)
    edited = copy.deepcopy(long_documents)
    edited[1] = Document(text=long_documents[1].text + "\n\nThis sentence was not there before.", doc_id="document 1")
    again = await made.arun(documents=edited) if asynchronous else made.run(documents=edited)
    changed = {each.text for each in again} - {each.text for each in nodes}
    assert 0 < len(changed) < len(again)
    assert kv.engine.ingested - computed == len(changed)
    assert stored(kv) == before + len({each.text for each in again}) - len(
        {each.text for each in nodes if each.ref_doc_id == "document 1"}
    )


def test_a_deleted_document_frees_only_what_nobody_else_holds(kv_of, embeddings, long_documents) -> None:
    kv = kv_of()
    made = pipeline(kv, embeddings)
    twin = Document(text=long_documents[0].text, doc_id="the twin")
    made.run(documents=[*long_documents, twin])
    everything = stored(kv)
    made.run(documents=long_documents)
    made.vector_store.flush()
    assert stored(kv) == everything
    made.run(documents=long_documents[1:])
    made.vector_store.flush()
    assert 0 < stored(kv) < everything


def test_index_refresh_and_delete(kv_of, long_documents) -> None:
    kv = kv_of()
    storage = StorageContext.from_defaults(vector_store=KVBlendVectorStore(SimpleVectorStore(), kv))
    index = VectorStoreIndex.from_documents(
        long_documents, storage_context=storage, transformations=[SentenceSplitter(chunk_size=80, chunk_overlap=0)]
    )
    computed, before = kv.engine.ingested, stored(kv)
    edited = copy.deepcopy(long_documents)
    edited[2] = Document(text=long_documents[2].text + "\n\nAnd one more sentence.", doc_id="document 2")
    assert index.refresh_ref_docs(edited) == [False, False, True]
    assert 0 < kv.engine.ingested - computed < 3
    index.delete_ref_doc("document 2", delete_from_docstore=True)
    storage.vector_store.flush()
    assert stored(kv) < before


def test_transform(kv_of, embeddings, long_documents) -> None:
    kv = kv_of()
    splitter = SentenceSplitter(chunk_size=80, chunk_overlap=0)
    nodes = IngestionPipeline(transformations=[splitter, KVBlendTransform(kv)]).run(documents=long_documents)
    assert kv.engine.ingested >= len(nodes) > 3
    store = KVBlendVectorStore(TextStore(), kv)
    store.delete("document 0")
    store.flush()
    assert stored(kv) < kv.engine.ingested


async def test_transform_async(kv_of, long_documents) -> None:
    kv = kv_of()
    splitter = SentenceSplitter(chunk_size=80, chunk_overlap=0)
    nodes = await IngestionPipeline(transformations=[splitter, KVBlendTransform(kv)]).arun(documents=long_documents)
    assert kv.engine.ingested >= len(nodes)
