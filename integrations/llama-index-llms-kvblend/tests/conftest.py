"""Fake engines with real matching, embeddings without a network, and tokenizers of both common families."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import llama_index.core
import pytest
from llama_index.core import Settings
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.schema import Document

from kvblend_rag import KVBlend
from kvblend_rag.demo.library import load_documents
from kvblend_rag.testing import fake_kvblend, trained_tokenizer

_CHATML = (
    "{%- if messages[0]['role'] != 'system' -%}<|im_start|>system\nYou answer questions.<|im_end|>\n{%- endif -%}"
    "{%- for message in messages -%}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)


class WordEmbedding(BaseEmbedding):
    """Hashed words: the same text has the same embedding in every process."""

    dimensions: int = 64

    def _embed(self, text: str) -> list[float]:
        vector = [0.0] * self.dimensions
        for word in re.findall(r"\w+", text.lower()):
            vector[zlib.crc32(word.encode()) % self.dimensions] += 1.0
        length = sum(value * value for value in vector) ** 0.5 or 1.0
        return [value / length for value in vector]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._embed(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._embed(query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._embed(text)


@pytest.fixture(autouse=True)
def embeddings() -> Iterator[WordEmbedding]:
    """LlamaIndex's settings are global: put back what a test leaves there."""
    before = {name: getattr(Settings, name) for name in ("_llm", "_embed_model", "_tokenizer", "_prompt_helper")}
    counting = llama_index.core.global_tokenizer
    Settings.embed_model = embedding = WordEmbedding()
    yield embedding
    llama_index.core.global_tokenizer = counting
    for name, value in before.items():
        setattr(Settings, name, value)


@pytest.fixture
def kv_of(tmp_path: Any) -> Iterator[Callable[..., KVBlend]]:
    """``kv_of(answers, **options)``: a KVBlend over a FakeEngine, which ``kv.engine`` is."""
    made: list[KVBlend] = []

    def make(answers: Any = "Answer.", store: str = "store", **options: Any) -> KVBlend:
        made.append(fake_kvblend(answers, store_path=tmp_path / store, **options))
        return made[-1]

    yield make
    for kv in made:
        kv.close()


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    """Sections of the demo's documents, of at least forty words."""
    sections = [each for each in load_documents() if len(each.text.split()) >= 40]
    return [Document(text=each.text, doc_id=each.id, metadata={"title": each.title}) for each in sections]


@pytest.fixture(scope="session")
def tokenizers(documents: list[Document]) -> dict[str, Any]:
    texts = [each.text for each in documents]
    return {family: trained_tokenizer(family, texts, _CHATML) for family in ("byte-pair", "sentencepiece")}


@pytest.fixture(scope="module")  # one module asks for it: no engine stays while others start theirs
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KVBlend]:
    """The bundled reader in vLLM; about half a minute to start."""
    pytest.importorskip("vllm")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from kvblend_rag.demo.reader import prepare_reader

    kv = KVBlend.from_config(
        model=str(prepare_reader(progress=False)),
        store_path=str(tmp_path_factory.mktemp("reader") / "store"),
        planner=False,  # prompts are short here, and what is tested is the blend
        engine_args={
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 2048,
            "max_num_seqs": 8,
            "kv_cache_memory_bytes": 1 << 28,
        },
    )
    yield kv
    kv.close()
