import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvblend_rag.blend.split import split_text


def words(text):
    """A tokenizer of words with their leading space, single marks, and newlines in groups."""
    return len(re.findall(r"\n+| ?\w{1,8}|[^\w\n]", text))


def long_text(paragraphs, sentences=6):
    sentence = "The quick brown fox number {0} jumps over the lazy dog, and rests. "
    return "\n\n".join("".join(sentence.format(i) for i in range(sentences)).strip() for _ in range(paragraphs))


pieces_of_text = st.sampled_from(
    [
        "word",
        " ",
        " ",
        "\n",
        "\n\n",
        ". ",
        "。",
        "e.g. ",
        "x" * 30,
        "漢字",
        "\t",
        "  \n \n",
        "!",
        "🙂",
        "a, b",
    ]
)


@given(st.lists(pieces_of_text, max_size=300).map("".join), st.integers(1, 60))
@settings(max_examples=300, deadline=None)
def test_no_piece_is_too_long_and_nothing_is_lost(text, max_tokens):
    pieces = split_text(text, words, max_tokens)
    assert re.sub(r"\s+", "", "".join(pieces)) == re.sub(r"\s+", "", text)
    assert all(piece.strip() for piece in pieces)
    assert all(words(piece) <= max_tokens for piece in pieces)


@given(st.lists(pieces_of_text, max_size=300).map("".join), st.integers(1, 60))
@settings(max_examples=200, deadline=None)
def test_pieces_stand_in_the_text_in_order(text, max_tokens):
    at = 0
    for piece in split_text(text, words, max_tokens):
        at = text.index(piece, at) + len(piece)


def test_a_short_text_stays_as_it_is():
    assert split_text("  One line.\n", words, 16) == ["  One line.\n"]
    assert split_text(" \n\n ", words, 16) == []
    assert split_text("", words, 16) == []


def test_paragraphs_come_first():
    text = long_text(8)
    pieces = split_text(text, words, 2 * words(long_text(1)) + 20)
    assert "".join(pieces) == text
    assert all(piece.endswith("\n\n") for piece in pieces[:-1])
    assert all(piece.startswith("The quick") for piece in pieces)


def test_then_sentences():
    text = long_text(1, sentences=60)
    pieces = split_text(text, words, 100)
    assert "".join(pieces) == text
    assert all(piece.endswith("rests.") for piece in pieces)
    assert all(piece.startswith(" The quick") for piece in pieces[1:])


def test_then_lines_then_words_then_anything():
    lines = "\n".join("one two three four five" for _ in range(60))
    assert all(piece.endswith("five\n") for piece in split_text(lines, words, 50)[:-1])
    spaced = " ".join("word" for _ in range(300))
    assert all(piece.startswith(" word") for piece in split_text(spaced, words, 50)[1:])
    assert "".join(split_text("x" * 900, words, 50)) == "x" * 900


def test_indentation_stays_with_its_line():
    code = "\n\n".join("def f():\n    return [value for value in range(10)]" for _ in range(40))
    pieces = split_text(code, words, 60)
    assert "".join(pieces) == code
    assert all(piece.startswith("def") for piece in pieces)


@pytest.mark.parametrize("sentences", range(10, 60, 3))
def test_pieces_are_balanced(sentences):
    text = long_text(1, sentences)
    counts = [words(piece) for piece in split_text(text, words, 128)]
    assert max(counts) <= 128
    if len(counts) > 1:
        assert min(counts) >= 128 * 0.35


def test_few_calls_of_the_tokenizer():
    calls = []

    def counted(text):
        calls.append(len(text))
        return words(text)

    text = long_text(100)
    pieces = split_text(text, counted, 256)
    assert len(calls) <= 1.2 * len(pieces) + 1
    assert sum(calls) <= 2.3 * len(text)


def test_text_of_uneven_density():
    text = long_text(3) + "\n\n" + " ".join("{[(" for _ in range(400)) + "\n\n" + long_text(3)
    pieces = split_text(text, words, 128)
    assert "".join(pieces) == text
    assert all(16 <= words(piece) <= 128 for piece in pieces)


def test_a_remainder_joins_its_neighbour():
    # by length alone the blank half would be a piece of its own, of few tokens
    text = "word " * 100 + " \n" * 2 + "\n" * 400 + "last words here"
    assert all(words(piece) >= 16 for piece in split_text(text, words, 96))


def test_an_impossible_limit():
    with pytest.raises(ValueError, match="max_tokens is 0"):
        split_text("a b", words, 0)
