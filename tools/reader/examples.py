"""Examples to teach with: questions over paragraphs, people's own and written here, and their distractors.

None uses a paragraph of ``val/``, or a template of the questions that ``kvblend eval`` makes.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SETS = ("squad_10", "nq_20", "musique_paragraphs", "hotpotqa", "musique_long_chunks", "mtrag_un")
WRITTEN_OVER = ("squad_10", "nq_20", "musique_paragraphs", "hotpotqa")
LEAST_LETTERS = 150
"""Of a paragraph that a question is written over."""

_SPAN = re.compile(r"\b(?:\d[\d.,]*\d|[A-Z][a-z]+(?: [A-Z][a-z]+)*)\b")
_SENTENCE = re.compile(r"[^.!?\n]{50,260}[.!?]")
_SHOTS = (
    (
        *("Jacksonville, Florida", "The city has only received one direct hit from a hurricane since 1871.", "1871"),
        "Since which year has Jacksonville received only one direct hit from a hurricane?",
    ),
    (
        *("Marie Curie", "She won the Nobel Prize in Physics in 1903 together with her husband Pierre.", "Pierre"),
        "With whom did Marie Curie share the Nobel Prize in Physics?",
    ),
    (
        *("Oder", "The Oder rises in the Czech Republic and flows through Poland for 840 km.", "Czech Republic"),
        "In which country does the Oder begin?",
    ),
)
_PEOPLE = ("Tilda Brandt", "Hugo Amaro", "Mina Okoro", "Jonas Weil", "Sofia Lindt", "Rafael Cruz", "Ada Nyberg")
_THINGS = ("blue lorry", "north pavilion", "evening ferry", "stone barn", "glass atelier", "old signal box")
_PLACES = ("Marlow", "Testa", "Kirkby", "Arden", "Solva", "Brixen", "Lund", "Hova", "Ferrol", "Nidau", "Zell", "Toro")


@dataclass
class Example:
    """A question, its answer, its evidence and documents to put around it."""

    question: str
    answer: str
    evidence: list[str]
    others: list[str]
    whole: bool = False
    """The evidence is not known: all of ``others`` is shown, in its order."""


def content(chunk: dict[str, str]) -> str:
    """A document's text as it stands in a prompt."""
    return f"{chunk['title']}\n{chunk['text']}" if chunk["title"] else chunk["text"]


class Paragraphs:
    """The development sets' rows, without paragraphs that the reader is evaluated on."""

    def __init__(self, folder: Path) -> None:
        """Args: the folder of the sets, with ``val/`` in it."""
        kept_out = {
            chunk["text"] for file in (folder / "val").glob("*.jsonl") for row in _read(file) for chunk in row["chunks"]
        }
        self.rows: dict[str, list[dict[str, Any]]] = {name: [] for name in SETS}
        for name in SETS:
            for row in _read(folder / f"{name}.jsonl"):
                there = [place for place, chunk in enumerate(row["chunks"]) if chunk["text"] not in kept_out]
                if any(place not in there for place in row["supporting"]):
                    continue
                row["supporting"] = [there.index(place) for place in row["supporting"]]
                row["chunks"] = [row["chunks"][place] for place in there]
                self.rows[name].append(row)

    def human(self) -> list[Example]:
        """People's questions that have an answer."""
        made = []
        for name, rows in self.rows.items():
            for row in rows:
                if not row["answers"] or row["kind"] in ("unanswerable", "underspecified"):
                    continue
                texts = [content(chunk) for chunk in row["chunks"]]
                marked = [texts[place] for place in row["supporting"]]
                others = [text for text in texts if text not in marked]
                known = bool(marked) and name != "mtrag_un"
                made.append(Example(row["question"], row["answers"][0], marked, others if known else texts, not known))
        return made

    def about(self) -> list[tuple[dict[str, str], list[str]]]:
        """Each paragraph once, and the documents of the questions it stands beside."""
        found: dict[str, tuple[dict[str, str], list[str]]] = {}
        for name in WRITTEN_OVER:
            for row in self.rows[name]:
                texts = [content(chunk) for chunk in row["chunks"]]
                for chunk, own in zip(row["chunks"], texts, strict=True):
                    if len(chunk["text"]) > LEAST_LETTERS:
                        found.setdefault(own, (chunk, [text for text in texts if text != own]))
        return list(found.values())


def writing_prompt(chunk: dict[str, str], draw: random.Random) -> str | None:
    """What a model without a chat template continues with a question about the paragraph; None if it holds no name."""
    text = chunk["text"][:500]
    spans = [span for span in _SPAN.findall(text[20:]) if len(span) > 3]
    if not spans:
        return None
    shots = [
        f"Title: {at}\nText: {shown}\nAnswer: {answer}\nQuestion: {asked}\n\n" for at, shown, answer, asked in _SHOTS
    ]
    return f"{''.join(shots)}Title: {chunk['title']}\nText: {text}\nAnswer: {draw.choice(spans)}\nQuestion:"


def question_of(written: str, chunk: dict[str, str]) -> str | None:
    """The question in what was written, if it is one and about the paragraph."""
    line = written.strip().split("\n")[0]
    if "?" not in line or "of the following" in line or any(line.startswith(shot[3][:20]) for shot in _SHOTS):
        return None
    line = line[: line.index("?") + 1]
    words = {word.lower() for word in re.findall(r"[A-Za-z]{5,}", line)} - {"which", "where", "whose", "about", "there"}
    there = {word.lower() for word in re.findall(r"[A-Za-z]{5,}", f"{chunk['title']} {chunk['text']}")}
    return line if len(line.split()) >= 5 and len(words & there) >= 2 else None


def _gap(chunk: dict[str, str], draw: random.Random) -> tuple[str, str] | None:
    found = [(sentence.strip(), _SPAN.findall(sentence.strip()[10:])) for sentence in _SENTENCE.findall(chunk["text"])]
    found = [(sentence, spans) for sentence, spans in found if spans]
    if not found:
        return None
    sentence, spans = draw.choice(found)
    span = draw.choice(spans)
    at = sentence.index(span, 10)
    return f'What is missing here: "{sentence[:at]}[...]{sentence[at + len(span) :]}"', span


def _rest(chunk: dict[str, str], draw: random.Random) -> tuple[str, str] | None:
    found = [words for sentence in _SENTENCE.findall(chunk["text"]) if len(words := sentence.split()) > 5]
    if not found:
        return None
    words = draw.choice(found)
    cut = draw.randint(min(5, len(words) - 2), max(5, len(words) - 3))
    return f"Complete the sentence: {' '.join(words[:cut])}", " ".join(words[cut:])


def from_text(chunk: dict[str, str], beside: list[str], draw: random.Random) -> Example | None:
    """A gap to fill in a sentence, or a sentence to complete."""
    made = draw.choice((_gap, _rest))(chunk, draw)
    return made and Example(made[0], made[1], [content(chunk)], beside)


def two_documents(first: str, second: str, beside: list[str], draw: random.Random) -> Example:
    """A question whose answer needs a sentence put behind each of two documents."""
    person, thing, place = draw.choice(_PEOPLE), draw.choice(_THINGS), draw.choice(_PLACES)
    ways: tuple[tuple[str, str, str, str], ...] = (
        (
            f"The {thing} belongs to {person}.",
            f"{person} lives in {place}.",
            f"Where does the owner of the {thing} live?",
            place,
        ),
        (
            f"{person} looks after the {thing}.",
            f"The telephone extension of {person} is {(number := str(draw.randrange(100, 999)))}.",
            f"Which extension reaches whoever looks after the {thing}?",
            number,
        ),
        (
            f"The {thing} stands in {place}.",
            f"In {place} the office of {person} is the only one.",
            f"Who has an office in the town of the {thing}?",
            person,
        ),
    )
    one, other, question, answer = draw.choice(ways)
    return Example(question, answer, [f"{first} {one}", f"{second} {other}"], beside)


def mixed(
    sources: list[tuple[float, Callable[[random.Random], Example | None]]], draw: random.Random
) -> Iterator[Example]:
    """Examples of these sources, each with its weight, without end."""
    weights = [weight for weight, _ in sources]
    while True:
        (source,) = draw.choices([make for _, make in sources], weights)
        made = source(draw)
        if made:
            yield made


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]
