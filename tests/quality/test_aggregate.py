import re

import pytest

from kvblend_rag.quality.aggregate import AGGREGATE, LOOKUP, aggregate_questions


@pytest.fixture(scope="module")
def questions():
    return aggregate_questions(24, documents=8, seed=2)


def test_an_aggregation_and_a_lookup_are_asked_over_the_same_documents(questions):
    for whole, one in zip(questions[::2], questions[1::2], strict=True):
        assert (whole.kind, one.kind) == (AGGREGATE, LOOKUP)
        assert whole.documents == one.documents
        assert len(set(whole.documents)) == 8
    assert len({each.documents for each in questions}) == 12


def test_the_answer_follows_from_all_documents_or_from_one(questions):
    for question in questions:
        (answer,) = question.answers
        if question.kind == LOOKUP:
            (place,) = question.supporting
            assert [answer in text for text in question.documents].index(True) == place
            continue
        project = re.search(r"the (\w+) project", question.text)[1]
        there = [place for place, text in enumerate(question.documents) if f"the {project} project" in text]
        assert tuple(there) == question.supporting
        if question.text.startswith("How many"):
            assert int(answer) == len(there)
        else:
            people = answer.split(", ")
            assert len(people) == len(there)
            for person, place in zip(people, there, strict=True):
                assert f"{person} works on the {project} project." in question.documents[place]


@pytest.mark.parametrize("documents", [2, 10, 16])
def test_the_seed_decides(documents):
    first = aggregate_questions(5, documents=documents, seed=1)
    assert first == aggregate_questions(5, documents=documents, seed=1)
    assert first != aggregate_questions(5, documents=documents, seed=3)
