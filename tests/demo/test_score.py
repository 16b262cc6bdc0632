import pytest

from kvblend_rag.demo.score import is_right, normalised


def test_case_punctuation_and_articles_do_not_count():
    assert normalised("The “Skylark”, at 1,200 o'clock: 7:30 or 3.5!") == [
        "skylark", "at", "1200", "oclock", "7:30", "or", "3.5",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("The Kingfisher.", "kingfisher", True),
        ("165 euros a night", ["165 euros"], True),
        ("31500 euros", ["31,500 euros"], True),
        ("120 euros", ["165 euros", "165"], False),
        ("1650 euros", "165", False),
        ("35", "3.5", False),
        ("not in the documents", "Not in the documents.", True),
        ("", "165", False),
        ("165", [], False),
        ("165", "", False),
        ("It costs 120 euros, or 165 euros during a fair, and 90 euros in winter", "165 euros", False),
    ],
)
def test_is_right(answer, expected, right):
    assert is_right(answer, expected) is right
