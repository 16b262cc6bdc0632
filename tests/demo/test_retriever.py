import logging
import shutil

import pytest

from kvblend_rag.demo.questions import load_questions
from kvblend_rag.demo.retriever import Retriever
from kvblend_rag.errors import ConfigError


@pytest.fixture(scope="module")
def retriever(documents):
    return Retriever(documents)


def test_all_evidence_is_among_six_documents(retriever):
    missed = [
        question.question
        for question in load_questions()
        if not set(question.evidence) <= {found.id for found in retriever.search(question.question, 6)}
    ]
    assert missed == []


def test_it_returns_k_different_documents_the_best_first(retriever):
    found = retriever.search("Heron: error codes", 4)
    assert found[0].id == "machines.md#heron-error-codes"
    assert len({document.id for document in found}) == 4


def test_k_may_exceed_the_documents_but_not_be_zero(documents):
    retriever = Retriever(documents[:3])
    assert len(retriever.search("leave", 10)) == 3
    with pytest.raises(ConfigError, match="k is 0"):
        retriever.search("leave", 0)


def test_no_documents_is_an_error():
    with pytest.raises(ConfigError, match="no documents"):
        Retriever([])


def test_save_and_load_give_the_same_results(retriever, tmp_path):
    retriever.save(tmp_path / "new" / "index")
    loaded = Retriever.load(tmp_path / "new" / "index")
    question = "Who teaches the course in gas safety?"
    assert loaded.search(question, 6) == retriever.search(question, 6)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "no saved retriever"),
        (lambda folder: (folder / "documents.json").write_text("[{}"), "can't be read"),
        (lambda folder: (folder / "documents.json").write_text("[]"), "incomplete"),
        (lambda folder: (folder / "index.faiss").write_bytes(b"IxFI"), "can't be read"),
        (lambda folder: (folder / "index.faiss").unlink(), "can't be read"),
    ],
)
def test_a_damaged_folder_is_one_clear_sentence(retriever, tmp_path, damage, message):
    folder = tmp_path / "index"
    retriever.save(folder)
    damage(folder)
    with pytest.raises(ConfigError, match=message):
        Retriever.load(folder)


def test_log_settings_of_the_application_stay_as_they_are(retriever):
    assert logging.getLogger().level == logging.WARNING
