import pytest

from kvblend_rag.demo.library import load_documents
from kvblend_rag.errors import ConfigError
from kvblend_rag.quality.probes import KINDS, probes

TEXTS = [document.content for document in load_documents()]


@pytest.fixture(scope="module")
def questions():
    return probes(TEXTS, 30, seed=4)


def test_the_kinds_take_turns_and_the_seed_decides(questions):
    assert [each.kind for each in questions] == [KINDS[number % 3] for number in range(30)]
    assert probes(TEXTS, 30, seed=4) == questions != probes(TEXTS, 30, seed=5)
    assert all(len(each.documents) == 6 and len(set(each.documents)) == 6 for each in questions)


def test_the_answer_stands_in_the_evidence_and_not_in_the_question(questions):
    for question in questions:
        (answer,) = question.answers
        assert answer
        evidence = [question.documents[place] for place in question.supporting]
        if question.kind == "lookup":
            joined = " ".join(" ".join(evidence).split())
            assert answer in joined
            continue
        assert any(answer in text for text in evidence)
        if question.kind == "two_chunk":
            assert len(evidence) == 2
            assert answer not in question.text
            assert answer not in evidence[0]


def test_a_gap_filled_is_the_sentence_again(questions):
    for question in questions:
        if question.kind == "cloze":
            sentence = question.text.partition("documents: ")[2].replace("____", question.answers[0])
            assert sentence in question.documents[question.supporting[0]]


@pytest.mark.parametrize(("texts", "why"), [(TEXTS[:3], "there are 3"), (["no sentence"] * 8, "no whole sentences")])
def test_documents_that_give_no_questions(texts, why):
    with pytest.raises(ConfigError, match=why):
        probes(texts, 3)


def test_a_word_that_begins_too_early_is_no_gap():
    early = "At oncemoreeverybody is in it and so we do it as of now and be."
    with pytest.raises(ConfigError, match="no whole sentences"):
        probes([early] * 6, 3)
    asked = probes([f"{early} And there is one in it that has a Falcon in it, as we do."] * 6, 60)
    assert {each.answers for each in asked if each.kind == "cloze"} == {("Falcon",)}
