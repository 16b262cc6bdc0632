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
from kvblend_rag.testing import fake_kvblend

_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
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
    """A byte-pair tokenizer, where ``.\\n\\n`` is one token, and a SentencePiece-like one, with its dummy space."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<|im_start|>", "<|im_end|>"]
    corpus = [each.text for each in documents] + ["A sentence.\n\nAnother.\n\nA third one.\n\n---\n"] * 20

    bytes_ = Tokenizer(models.BPE())
    bytes_.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_QWEN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    bytes_.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bytes_.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, special_tokens=special)
    )

    pieces = Tokenizer(models.Unigram())
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    pieces.decoder = decoders.Metaspace(prepend_scheme="first")
    characters = sorted({character for text in corpus for character in text} | set(map(chr, range(32, 127))) | {"\n"})
    pieces.train_from_iterator(
        corpus,
        trainers.UnigramTrainer(
            vocab_size=2000, initial_alphabet=characters, special_tokens=special, unk_token="<unk>", show_progress=False
        ),
    )

    made = {}
    for name, tokenizer in (("byte-pair", bytes_), ("sentencepiece", pieces)):
        tokenizer.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in special])
        made[name] = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>", clean_up_tokenization_spaces=False
        )
        made[name].chat_template = _CHATML
    return made


@pytest.fixture(scope="module")  # one module asks for it: no engine stays while others start theirs
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KVBlend]:
    """The bundled reader in vLLM; about half a minute to start."""
    pytest.importorskip("vllm")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from kvblend_rag.demo.reader import prepare_reader

    kv = KVBlend.from_config(
        model=str(prepare_reader(progress=False)),
        store_path=str(tmp_path_factory.mktemp("reader") / "store"),
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
