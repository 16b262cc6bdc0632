import json

from kvblend_rag.demo.library import Document
from kvblend_rag.demo.prompt import SYSTEM_PROMPT, UNANSWERABLE, messages
from kvblend_rag.demo.reader import ADAPTER


def test_it_is_the_form_the_reader_was_made_for():
    made_for = json.loads((ADAPTER / "adapter.json").read_text())
    assert made_for["system_prompt"] == SYSTEM_PROMPT
    assert made_for["unanswerable"] == UNANSWERABLE


def test_documents_are_joined_by_a_blank_line_before_the_question():
    documents = [Document("a", "Tea", "Green."), Document("b", "Milk", "White.")]
    system, user = messages("Which colour has tea?", documents)
    assert system == {"role": "system", "content": SYSTEM_PROMPT}
    assert user == {
        "role": "user",
        "content": "Tea\nGreen.\n\nMilk\nWhite.\n\nQuestion: Which colour has tea?",
    }


def test_without_documents_the_question_stands_alone():
    assert messages("Why?", [])[1]["content"] == "Question: Why?"
