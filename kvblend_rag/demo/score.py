"""Is an answer right? Compared without case, punctuation and articles."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_ARTICLES = {"a", "an", "the"}
# A right answer may be wrapped in a few words more; a longer text that also names it is not an answer.
_WORDS_AROUND = 6


def normalised(text: str) -> list[str]:
    """The words of a text, lower-case, without punctuation and articles; ``1,200`` becomes ``1200``."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"(?<=\d),(?=\d{3})|['’]", "", text)
    words = re.findall(r"\d+(?:[.,:]\d+)+|\w+", text)
    return [word for word in words if word not in _ARTICLES]


def is_right(answer: str, expected_answers: str | Sequence[str]) -> bool:
    """Whether the answer is one of those expected, or holds it within a few words more."""
    expected_answers = [expected_answers] if isinstance(expected_answers, str) else expected_answers
    given = normalised(answer)
    return any(_holds(given, normalised(expected)) for expected in expected_answers)


def _holds(given: list[str], wanted: list[str]) -> bool:
    if not wanted or len(given) > len(wanted) + _WORDS_AROUND:
        return False
    return any(given[i : i + len(wanted)] == wanted for i in range(len(given) - len(wanted) + 1))


__all__ = ["is_right", "normalised"]
