"""Probes: questions made from any documents, for those who have none; the answer is in the documents by making.

``cloze`` asks for a word of one document, ``lookup`` for how a sentence goes on, and ``two_chunk`` for a
number that two documents tell together, each by a sentence put behind its text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from kvblend_rag.errors import ConfigError
from kvblend_rag.quality.questions import Question

SET = "probes"
KINDS = ("cloze", "lookup", "two_chunk")

_SENTENCE = re.compile(r"[^.!?\n|#]{40,240}[.!?]")
_TELLING = re.compile(r"\b(?:\d[\d.,:]*\d|\d|[A-Z][a-z]{3,}|[a-z]{7,})\b")
_FROM = 8
"""Where in a sentence a gap may begin: what stands in front tells which sentence it is."""

_LAST_WORDS = 5
_KEEPERS = ("Anna Lopez", "Viktor Novak", "Ingrid Larsen", "Carlos Moreno", "Leila Haddad", "Oscar Fischer")
_FILES = ("Falcon", "Granite", "Orchid", "Beacon", "Saffron", "Glacier", "Lantern", "Meridian")


def probes(documents: Sequence[str], count: int, *, several: int = 6, seed: int = 0) -> list[Question]:
    """Questions of the three kinds in turn.

    Args:
        documents: texts, a chunk each; at least as many as stand in a prompt.
        count: how many questions.
        several: documents in a prompt, 2 or more.
        seed: the same one gives the same questions.

    Raises:
        ConfigError: too few documents, or none with a whole sentence in it.
    """
    if len(documents) < several:
        raise ConfigError(f"Questions are made over {several} documents each, and there are {len(documents)}.")
    sentences = {place: _SENTENCE.findall(text) for place, text in enumerate(documents)}
    telling = [place for place, found in sentences.items() if any(_gaps(each.strip()) for each in found)]
    if not telling:
        raise ConfigError("The documents hold no whole sentences to ask about: give --questions.")
    questions = []
    for number in range(count):
        draw = random.Random(f"{seed}-{number}")
        kind = KINDS[number % len(KINDS)]
        chosen = draw.sample(range(len(documents)), several)
        evidence = draw.choice(telling)
        if evidence not in chosen:
            chosen[draw.randrange(several)] = evidence
        texts = [documents[place] for place in chosen]
        supporting: tuple[int, ...] = (chosen.index(evidence),)
        if kind == "two_chunk":
            text, answer, supporting = _two_chunk(draw, texts)
        else:
            text, answer = (_cloze if kind == "cloze" else _lookup)(draw, sentences[evidence])
        questions.append(Question.made(SET, f"{seed}-{number}", kind, text, answer, texts, supporting))
    return questions


def _gaps(sentence: str) -> list[re.Match[str]]:
    return list(_TELLING.finditer(sentence, _FROM))


def _cloze(draw: random.Random, sentences: Sequence[str]) -> tuple[str, str]:
    sentence = draw.choice([each.strip() for each in sentences if _gaps(each.strip())])
    word = draw.choice(_gaps(sentence))
    gap = f"{sentence[: word.start()]}____{sentence[word.end() :]}"
    return f"Which word or number fills the gap in this sentence of the documents: {gap}", word[0]


def _lookup(draw: random.Random, sentences: Sequence[str]) -> tuple[str, str]:
    words = draw.choice([each.strip() for each in sentences]).split()
    cut = max(len(words) - _LAST_WORDS, len(words) // 2)
    return f"In the documents, how does this sentence end: {' '.join(words[:cut])} …", " ".join(words[cut:])


def _two_chunk(draw: random.Random, texts: list[str]) -> tuple[str, str, tuple[int, int]]:
    first, second = draw.sample(range(len(texts)), 2)
    file, keeper, number = draw.choice(_FILES), draw.choice(_KEEPERS), str(draw.randrange(1000, 9999))
    texts[first] += f" The {file} file is kept by {keeper}."
    texts[second] += f" The badge number of {keeper} is {number}."
    return f"What is the badge number of the person who keeps the {file} file?", number, (first, second)


__all__ = ["KINDS", "SET", "probes"]
