"""LangChain's standard suites for vector stores and retrievers, over the wrappers."""

from __future__ import annotations

import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_kvblend import KVBlendRetriever, KVBlendVectorStore
from langchain_tests.integration_tests import RetrieversIntegrationTests, VectorStoreIntegrationTests


class TestVectorStore(VectorStoreIntegrationTests):
    @pytest.fixture(params=["foreground", "background"])
    def vectorstore(self, request, kv):
        inner = InMemoryVectorStore(self.get_embeddings())
        store = KVBlendVectorStore(inner, kv, background=request.param == "background")
        yield store
        store.close()


class TestRetriever(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def _retriever(self, kv):
        self._kv = kv

    @property
    def retriever_constructor(self):
        def make(**params):
            inner = InMemoryVectorStore.from_texts(["one", "two", "three", "four"], DeterministicFakeEmbedding(size=8))
            return KVBlendRetriever(inner.as_retriever(search_kwargs=params), self._kv)

        return make

    @property
    def retriever_constructor_params(self):
        return {"k": 2}

    @property
    def retriever_query_example(self):
        return "one"
