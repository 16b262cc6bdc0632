from kvblend_rag.demo.prompt import UNANSWERABLE
from kvblend_rag.demo.questions import load_questions
from kvblend_rag.demo.score import normalised


def test_there_are_enough_of_each_kind():
    questions = load_questions()
    assert len(questions) >= 12
    assert sum(len(question.evidence) == 2 for question in questions) >= 3
    assert sum(not question.evidence for question in questions) >= 1
    assert all(question.answers == (UNANSWERABLE,) for question in questions if not question.evidence)


def test_every_answer_stands_in_its_evidence(documents):
    text = {document.id: " ".join(normalised(document.content)) for document in documents}
    for question in load_questions():
        evidence = " ".join(text[name] for name in question.evidence)
        answers = [" ".join(normalised(answer)) for answer in question.answers]
        assert not question.evidence or any(answer in evidence for answer in answers), question


def test_the_evidence_of_single_questions_is_spread_over_the_documents():
    single = [question.evidence[0] for question in load_questions() if len(question.evidence) == 1]
    assert len(set(single)) == len(single)
    assert len({name.split("#")[0] for name in single}) >= 6
