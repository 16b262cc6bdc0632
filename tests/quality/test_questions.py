import json

import pytest

from kvblend_rag.errors import ConfigError
from kvblend_rag.quality.questions import read_questions
from kvblend_rag.quality.two_chunk import two_chunk_questions

ROW = {
    "id": "a",
    "question": "Who?",
    "answers": ["Ada", "Ada L."],
    "kind": "multi_hop",
    "chunks": [{"title": "T", "text": "one"}, {"title": "", "text": "two"}, {"title": "U", "text": "three"}],
    "supporting": [2],
}


@pytest.fixture
def write(tmp_path):
    def write(name, *rows):
        file = tmp_path / name
        file.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
        return file

    return write


def test_our_format(write):
    (question,) = read_questions([write("set.jsonl", ROW)])
    assert (question.id, question.set, question.kind, question.text) == ("a", "set", "multi_hop", "Who?")
    assert question.answers == ("Ada", "Ada L.")
    assert question.documents == ("T\none", "two", "U\nthree")
    assert question.supporting == (2,)


def test_longbench_passages_become_documents(write):
    context = "Passage 1:\nRiver\nLong text.\nPassage 2:\nLake\nOther text.\n"
    row = {"input": "Which?", "context": context, "answers": ["x"], "dataset": "hotpotqa", "_id": "7", "length": 3}
    (question,) = read_questions([write("lb.jsonl", row)])
    assert question.documents == ("River\nLong text.", "Lake\nOther text.")
    assert (question.id, question.kind, question.text) == ("7", "hotpotqa", "Which?")


def test_longbench_without_passages_is_one_document(write):
    (question,) = read_questions([write("lb.jsonl", {"input": "?", "context": "All of it.", "answers": ["x"]})])
    assert question.documents == ("All of it.",)


def test_history_gets_the_roles_of_chat_messages(write):
    turns = [{"speaker": "user", "text": "Hi"}, {"speaker": "agent", "text": "Hello"}]
    (question,) = read_questions([write("c.jsonl", {**ROW, "history": turns})])
    assert question.history == (("user", "Hi"), ("assistant", "Hello"))


def test_rows_without_an_answer_are_left_out_and_a_limit_spreads(write, tmp_path):
    write("b.jsonl", *({**ROW, "id": str(i), "answers": ["x"] if i % 2 else []} for i in range(20)))
    write("a.jsonl", ROW)
    questions = read_questions([tmp_path], limit=5)
    assert [question.id for question in questions] == ["a", "1", "5", "9", "13", "17"]


def test_fewer_documents_keep_the_evidence(write):
    (question,) = read_questions([write("set.jsonl", ROW)], documents=2)
    assert question.documents == ("T\none", "U\nthree")
    assert question.supporting == (1,)


@pytest.mark.parametrize("text", ["{", '{"question": "?"}', '{"question": "?", "answers": ["x"], "chunks": 3}', "[1]"])
def test_what_is_no_question_is_named_with_its_line(tmp_path, text):
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps(ROW) + "\n" + text + "\n")
    with pytest.raises(ConfigError, match=r"Line 2 of .*bad\.jsonl"):
        read_questions([file])


def test_nothing_to_ask(tmp_path, write):
    with pytest.raises(ConfigError, match="can't be read"):
        read_questions([tmp_path / "none.jsonl"])
    with pytest.raises(ConfigError, match="no questions"):
        read_questions([write("empty.jsonl", {**ROW, "answers": []})])


def test_made_questions_have_their_answer_in_their_evidence_alone():
    questions = two_chunk_questions(60, documents=8, seed=3)
    assert questions == two_chunk_questions(60, documents=8, seed=3)
    assert questions != two_chunk_questions(60, documents=8, seed=4)
    for question in questions:
        assert len(question.documents) == 8
        holders = [place for place, text in enumerate(question.documents) if question.answers[0] in text]
        assert holders == [question.supporting[-1]]
        if question.kind == "two_hops":
            leader = question.text.removeprefix("What is the badge number of the person who leads the ")
            assert f"The {leader.removesuffix(' project?')} project" in question.documents[question.supporting[0]]
            assert len(set(question.supporting)) == 2
        if question.kind == "pronoun":
            person = question.text.removeprefix("What is the badge number of ").removesuffix("?")
            assert person in question.documents[question.supporting[0]]
            assert person not in question.documents[question.supporting[1]]
