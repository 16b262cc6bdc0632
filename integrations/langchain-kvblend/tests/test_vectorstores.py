from __future__ import annotations

import threading

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.indexing import InMemoryRecordManager, aindex, index
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables.config import run_in_executor
from langchain_core.stores import InMemoryStore
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_core.vectorstores.base import VectorStore
from langchain_kvblend import KVBlendRetriever, KVBlendVectorStore, PrefetchHandler

from kvblend_rag.errors import ConfigError, KVBlendWarning, StoreError

EMBEDDING = DeterministicFakeEmbedding(size=16)


def inner():
    return InMemoryVectorStore(EMBEDDING)


def prefetches(kv):
    return [arguments for method, arguments in kv.engine.calls if method == "prefetch"]


def keys(kv, *texts):
    return {key for text in texts for key, _ in kv.cut(text)}


def held(kv, *texts):
    """Whether all chunks of texts are stored."""
    wanted = keys(kv, *texts)
    assert wanted
    return not set(kv.catalogue.missing(wanted))


@pytest.fixture
def documents(words):
    return [Document(words(name), metadata={"source": f"{name}.md"}) for name in ("ash", "birch", "cedar")]


# Adding and deleting


def test_adding_precomputes_and_deleting_releases(kv, documents):
    store = KVBlendVectorStore(inner(), kv)
    ids = store.add_documents(documents)
    assert len(ids) == 3
    assert kv.engine.ingested == 3
    assert held(kv, *(each.page_content for each in documents))
    store.add_documents(documents, ids=ids)
    assert kv.engine.ingested == 3
    store.delete(ids[:1])
    assert not held(kv, documents[0].page_content)
    assert held(kv, documents[1].page_content)


async def test_asynchronously(kv, documents):
    store = KVBlendVectorStore(inner(), kv)
    ids = await store.aadd_documents(documents)
    assert kv.engine.ingested == 3
    found = await store.asimilarity_search("x", k=2)
    assert len(found) == 2
    assert len(prefetches(kv)) == 1
    await store.adelete(ids)
    assert not held(kv, documents[0].page_content)
    more = await store.aadd_texts([documents[0].page_content])
    assert len(more) == 1
    assert held(kv, documents[0].page_content)


def test_texts(kv, words):
    store = KVBlendVectorStore(inner(), kv)
    assert store.add_texts((each for each in [words("ash")]), [{"a": 1}], ids=["7"]) == ["7"]
    assert held(kv, words("ash"))
    assert store.get_by_ids(["7"])[0].metadata == {"a": 1}


def test_a_chunk_stays_as_long_as_a_document_holds_it(kv, documents):
    store = KVBlendVectorStore(inner(), kv)
    first, second = store.add_documents([documents[0], documents[0]])
    assert kv.engine.ingested == 1
    store.delete([first])
    assert held(kv, documents[0].page_content)
    store.delete([second])
    assert not held(kv, documents[0].page_content)


def test_replacing_a_document_lets_its_old_chunks_go(kv, documents):
    store = KVBlendVectorStore(inner(), kv)
    store.add_documents(documents[:1], ids=["1"])
    store.add_documents(documents[1:2], ids=["1"])
    assert not held(kv, documents[0].page_content)
    assert held(kv, documents[1].page_content)


def test_namespaces_tell_equal_ids_apart(kv, documents):
    one = KVBlendVectorStore(inner(), kv, namespace="one")
    two = KVBlendVectorStore(inner(), kv, namespace="two")
    one.add_documents(documents[:1], ids=["1"])
    two.add_documents(documents[1:2], ids=["1"])
    assert held(kv, documents[0].page_content, documents[1].page_content)
    two.delete(["1"])
    assert held(kv, documents[0].page_content)


def test_deleting_without_ids_warns(kv, documents):
    store = KVBlendVectorStore(inner(), kv)
    store.add_documents(documents)
    with pytest.warns(KVBlendWarning, match="without naming their ids"):
        store.delete()
    assert held(kv, documents[0].page_content)


def test_what_the_wrapped_store_refuses_is_not_precomputed(kv, documents):
    class Broken(InMemoryVectorStore):
        def add_documents(self, documents, **kwargs):
            raise RuntimeError("full")

    with pytest.raises(RuntimeError, match="full"):
        KVBlendVectorStore(Broken(EMBEDDING), kv).add_documents(documents)
    assert kv.engine.ingested == 0


def test_a_model_that_can_not_be_blended_only_warns(make_kv, documents):
    store = KVBlendVectorStore(inner(), make_kv(refusal="it has no rotary embedding"))
    with pytest.warns(KVBlendWarning, match="no rotary embedding"):
        store.add_documents(documents)
    assert len(store.similarity_search("x", k=3)) == 3


def test_what_is_stored_is_what_stands_in_the_prompt(kv, documents):
    prompt = PromptTemplate.from_template("Source: {source}\nContent: {page_content}")
    KVBlendVectorStore(inner(), kv, document_prompt=prompt).add_documents(documents)
    assert held(kv, f"Source: ash.md\nContent: {documents[0].page_content}")
    KVBlendVectorStore(inner(), kv, document_prompt=lambda each: f"<{each.page_content}>").add_documents(documents)
    assert held(kv, f"<{documents[0].page_content}>")


# In the background


def test_in_the_background(kv, documents):
    store = KVBlendVectorStore(inner(), kv, background=True)
    ids = store.add_documents(documents)
    report = store.flush()
    assert (report.computed, store.pending) == (3, 0)
    store.delete(ids)
    store.flush()
    assert not held(kv, documents[0].page_content)
    store.close()
    store.close()


def test_adding_waits_when_too_much_is_waiting(kv, words, monkeypatch):
    gate = threading.Event()
    replace = kv.replace
    monkeypatch.setattr(kv, "replace", lambda *given, **more: (gate.wait(20), replace(*given, **more))[1])
    store = KVBlendVectorStore(inner(), kv, background=True, capacity=2)
    done = threading.Event()

    def add():
        for name in ("ash", "birch", "cedar", "date"):
            store.add_documents([Document(words(name))])
        done.set()

    thread = threading.Thread(target=add)
    thread.start()
    assert not done.wait(0.3)
    assert store.pending <= 2
    gate.set()
    assert done.wait(20)
    thread.join()
    assert store.flush().computed == 4
    store.close()


def test_errors_of_the_background_come_with_flush(kv, documents, monkeypatch):
    def fail(*given, **more):
        raise StoreError("no space")

    monkeypatch.setattr(kv, "replace", fail)
    store = KVBlendVectorStore(inner(), kv, background=True)
    store.add_documents(documents)
    with pytest.raises(StoreError, match="no space"):
        store.flush()
    store.close()


# Finding


async def test_every_search_prefetches(kv, documents):
    store = KVBlendVectorStore(inner(), kv)
    store.add_documents(documents)
    vector = EMBEDDING.embed_query("x")
    searches = [
        lambda: store.similarity_search("x", k=2),
        lambda: store.similarity_search_with_score("x", k=2),
        lambda: store.similarity_search_by_vector(vector, k=2),
        lambda: store.max_marginal_relevance_search("x", k=2),
        lambda: (
            store.max_marginal_relevance_search_by_vector(vector, k=2)
            if type(store.store).max_marginal_relevance_search_by_vector
            is not VectorStore.max_marginal_relevance_search_by_vector
            else store.similarity_search("x", k=2)
        ),
        lambda: store.search("x", "similarity", k=2),
        lambda: store.search("x", "mmr", k=2),
        lambda: store.as_retriever(search_kwargs={"k": 2}).invoke("x"),
        lambda: store.as_retriever(search_type="mmr", search_kwargs={"k": 2}).invoke("x"),
    ]
    for count, search in enumerate(searches, 1):
        assert len(search()) == 2
        assert len(prefetches(kv)) == count
        assert len(prefetches(kv)[-1][0]) == 2
    before = len(searches)
    for count, search in enumerate(
        [
            store.asimilarity_search("x", k=2),
            store.asimilarity_search_with_score("x", k=2),
            store.asimilarity_search_by_vector(vector, k=2),
            store.amax_marginal_relevance_search("x", k=2),
            store.asearch("x", "similarity", k=2),
            store.as_retriever(search_kwargs={"k": 2}).ainvoke("x"),
        ],
        before + 1,
    ):
        assert len(await search) == 2
        assert len(prefetches(kv)) == count


def test_a_search_that_must_not_prefetch(kv, documents):
    store = KVBlendVectorStore(inner(), kv, prefetch=False)
    store.add_documents(documents)
    assert len(store.similarity_search("x", k=2)) == 2
    assert not prefetches(kv)


def test_relevance_scores_are_the_wrapped_store_s(kv, documents):
    class Scored(InMemoryVectorStore):
        def _select_relevance_score_fn(self):
            return lambda score: score / 2 + 0.25

    store = KVBlendVectorStore(Scored(EMBEDDING), kv)
    store.add_documents(documents)
    plain = store.store.similarity_search_with_relevance_scores("x", k=3)
    assert store.similarity_search_with_relevance_scores("x", k=3) == plain
    assert prefetches(kv)
    threshold = store.as_retriever(search_type="similarity_score_threshold", search_kwargs={"score_threshold": 0.0})
    assert threshold.invoke("x")


def test_everything_else_is_the_wrapped_store_s(kv, documents, tmp_path):
    store = KVBlendVectorStore(inner(), kv)
    store.add_documents(documents)
    assert store.embeddings is EMBEDDING
    assert len(store.store.store) == 3
    store.dump(str(tmp_path / "dump.json"))
    assert (tmp_path / "dump.json").exists()
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = store.no_such_thing


def test_searching_before_the_engine_runs_starts_nothing(tmp_path, monkeypatch):
    from kvblend_rag import KVBlend

    def launch(config):
        raise AssertionError("a search must not start the engine")

    monkeypatch.setattr("kvblend_rag.kvblend._launch", launch)
    plain = inner()
    plain.add_texts(["some text"])
    with KVBlend.from_config(model="m", store_path=str(tmp_path)) as kv:
        assert len(KVBlendVectorStore(plain, kv).similarity_search("x")) == 1
        assert len(KVBlendRetriever(plain.as_retriever(), kv).invoke("x")) == 1
        assert len(plain.as_retriever().invoke("x", {"callbacks": [PrefetchHandler(kv)]})) == 1


# Making one


def test_from_documents(kv, documents):
    store = KVBlendVectorStore.from_documents(documents, EMBEDDING, kv=kv, ids=["a", "b", "c"])
    assert isinstance(store.store, InMemoryVectorStore)
    assert kv.engine.ingested == 3
    store.delete(["a"])
    assert not held(kv, documents[0].page_content)
    with pytest.raises(ConfigError, match="need kv="):
        KVBlendVectorStore.from_documents(documents, EMBEDDING)


async def test_from_texts(kv, words):
    prompt = PromptTemplate.from_template("Source: {source}\n{page_content}")
    store = KVBlendVectorStore.from_texts(
        [words("ash")], EMBEDDING, [{"source": "a"}], kv=kv, document_prompt=prompt, store_class=InMemoryVectorStore
    )
    assert held(kv, "Source: a\n" + words("ash"))
    assert store.document_prompt is prompt
    await KVBlendVectorStore.afrom_texts([words("birch")], EMBEDDING, kv=kv)
    assert held(kv, words("birch"))


# An index that exists already


def test_adopting_what_the_store_holds(kv, documents):
    plain = inner()
    ids = plain.add_documents(documents)
    store = KVBlendVectorStore(plain, kv)
    report = store.adopt(progress=False)
    assert report.computed == 3
    again = store.adopt(progress=False)
    assert (again.computed, again.present) == (0, 3)
    store.delete(ids[:1])
    assert not held(kv, documents[0].page_content)


def test_adopting_goes_on_where_it_stopped(kv, words):
    plain = inner()
    plain.add_documents([Document(words(f"tree{place}x")) for place in range(200)])
    store = KVBlendVectorStore(plain, kv)
    failed = False
    ingest = kv.replace

    def fail_in_between(texts, **more):
        nonlocal failed
        if kv.engine.ingested >= 64 and not failed:
            failed = True
            raise StoreError("interrupted")
        return ingest(texts, **more)

    kv.replace = fail_in_between
    with pytest.raises(StoreError):
        store.adopt(progress=False)
    done = kv.engine.ingested
    assert 0 < done < 200
    assert store.adopt(progress=False).computed == 200 - done


def test_adopting_documents_ids_and_a_docstore(kv, words):
    plain = inner()
    texts = {name: words(name) for name in ("ash", "birch", "cedar")}
    plain.add_documents([Document(text, id=name) for name, text in texts.items()])
    store = KVBlendVectorStore(plain, kv)
    assert store.adopt([Document(texts["ash"], id="ash")], progress=False).computed == 1
    assert store.adopt(ids=["birch", "gone"], progress=False).computed == 1
    docstore = InMemoryStore()
    docstore.mset([("cedar", Document(texts["cedar"]))])
    assert store.adopt(docstore=docstore, progress=False).computed == 1
    store.delete(["cedar"])
    assert not held(kv, texts["cedar"])
    with pytest.raises(ConfigError, match="has no id"):
        store.adopt([Document("x")], progress=False)

    class Other(VectorStore):
        def similarity_search(self, query, k=4, **kwargs):
            return []

        @classmethod
        def from_texts(cls, *args, **kwargs):
            raise NotImplementedError

    with pytest.raises(ConfigError, match="Other can't say which documents it holds"):
        KVBlendVectorStore(Other(), kv).adopt()


def test_adopting_a_faiss_like_and_a_chroma_like_store(kv, words):
    class Faiss(InMemoryVectorStore):
        @property
        def index_to_docstore_id(self):
            return dict(enumerate(self.store))

    class FaissOnly(VectorStore):
        def __init__(self):
            self._inside = Faiss(EMBEDDING)

        def __getattr__(self, name):
            return getattr(self._inside, name)

        def get_by_ids(self, ids, /):
            return self._inside.get_by_ids(ids)

        def similarity_search(self, query, k=4, **kwargs):
            return []

        @classmethod
        def from_texts(cls, *args, **kwargs):
            raise NotImplementedError

    class ChromaLike(FaissOnly):
        index_to_docstore_id = None

        def get(self, include=None):
            return {"ids": list(self._inside.store)}

    for kind, name in ((FaissOnly, "ash"), (ChromaLike, "birch")):
        plain = kind()
        plain._inside.add_texts([words(name)])
        assert KVBlendVectorStore(plain, kv).adopt(progress=False).computed == 1
        assert held(kv, words(name))


# LangChain's index()


def recorded():
    manager = InMemoryRecordManager("docs")
    manager.create_schema()
    return manager


@pytest.mark.parametrize("cleanup", ["incremental", "full"])
def test_index_with_a_record_manager(kv, words, cleanup):
    def split(name, parts):
        return [Document(words(part), metadata={"source": name}) for part in parts]

    manager = recorded()
    store = KVBlendVectorStore(inner(), kv)

    def run(documents):
        return index(documents, manager, store, cleanup=cleanup, source_id_key="source", key_encoder="sha256")

    one, two = split("one.md", ["ash", "birch", "shared"]), split("two.md", ["cedar", "date"])
    two.append(Document(words("shared") + " ", metadata={"source": "two.md"}))
    assert run([*one, *two])["num_added"] == 6
    computed = kv.engine.ingested

    again = run([*one, *two])  # a second run computes nothing
    assert (again["num_added"], again["num_skipped"]) == (0, 6)
    assert kv.engine.ingested == computed

    edited = split("one.md", ["ash", "elder", "shared"])  # only the changed chunk is computed
    assert run([*edited, *two])["num_added"] == 1
    assert kv.engine.ingested == computed + 1
    assert held(kv, words("ash"), words("elder"), words("shared"))
    assert not held(kv, words("birch"))

    if cleanup == "full":  # a deleted document frees only what nobody else holds
        assert run(edited)["num_deleted"] == 3
        assert not held(kv, words("cedar"))
        assert held(kv, words("ash"), words("shared"))
    assert kv.engine.ingested == computed + 1


def test_index_frees_a_chunk_when_its_last_document_goes(kv, words):
    manager = recorded()
    store = KVBlendVectorStore(inner(), kv)
    both = [Document(words("shared"), metadata={"source": name}) for name in ("one.md", "two.md")]

    def run(documents):
        index(documents, manager, store, cleanup="full", source_id_key="source", key_encoder="sha256")

    run(both)
    assert kv.engine.ingested == 1
    run(both[:1])
    assert held(kv, words("shared"))
    run([])
    assert not held(kv, words("shared"))


async def test_aindex(kv, documents):
    manager = recorded()
    store = KVBlendVectorStore(inner(), kv)
    for expected in (3, 0):
        done = await aindex(
            documents, manager, store, cleanup="incremental", source_id_key="source", key_encoder="sha256"
        )
        assert done["num_added"] == expected
    assert kv.engine.ingested == 3


def test_a_restart_keeps_it(make_kv, documents, tmp_path):
    plain, store_path = inner(), tmp_path / "kept"
    first = make_kv(store_path=store_path)
    ids = KVBlendVectorStore(plain, first).add_documents(documents)
    first.close()
    second = make_kv(store_path=store_path)
    store = KVBlendVectorStore(plain, second)
    assert store.adopt(progress=False).computed == 0
    store.delete(ids[:1])
    assert not held(second, documents[0].page_content)
    assert held(second, documents[1].page_content)


# Other retrievers


async def test_a_wrapped_retriever_prefetches(kv, documents):
    plain = inner()
    plain.add_documents(documents)
    kv.ingest([each.page_content for each in documents], progress=False)
    retriever = KVBlendRetriever(plain.as_retriever(search_kwargs={"k": 2}), kv)
    assert len(retriever.invoke("x")) == 2
    assert len(await retriever.ainvoke("x")) == 2
    assert [len(arguments[0]) for arguments in prefetches(kv)] == [2, 2]
    titled = KVBlendRetriever(retriever.retriever, kv, document_prompt=lambda each: "Title\n" + each.page_content)
    titled.invoke("x")
    assert prefetches(kv)[-1][0] != prefetches(kv)[0][0]


async def test_the_handler_prefetches_what_any_retriever_finds(kv, documents):
    plain = inner()
    plain.add_documents(documents)
    kv.ingest([each.page_content for each in documents], progress=False)
    config = {"callbacks": [PrefetchHandler(kv)]}
    plain.as_retriever(search_kwargs={"k": 3}).invoke("x", config)
    await plain.as_retriever(search_kwargs={"k": 3}).ainvoke("x", config)
    await run_in_executor(None, lambda: None)
    assert [len(arguments[0]) for arguments in prefetches(kv)] == [3, 3]
    PrefetchHandler(kv).on_retriever_end([], run_id=None)
    assert len(prefetches(kv)) == 2
