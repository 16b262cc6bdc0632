"""Questions with the documents they are asked over, read from JSON lines in two formats.

The first has ``question``, ``answers`` and ``chunks`` (a list of ``{title, text}``), and may have ``id``,
``kind``, ``supporting`` (positions in ``chunks``) and ``history`` (earlier turns). The second is LongBench's:
``input``, ``context`` and ``answers`` (https://github.com/THUDM/LongBench).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvblend_rag.errors import ConfigError

_PASSAGE = re.compile(r"^Passage \d+:\n", re.MULTILINE)
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "agent": "assistant"}


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question and its documents, in the order in which they stand in the prompt."""

    id: str
    set: str
    """The file it came from, without its suffix."""
    kind: str
    text: str
    answers: tuple[str, ...]
    """What is accepted; the first is the gold answer whose likelihood is measured."""
    documents: tuple[str, ...]
    supporting: tuple[int, ...] = ()
    """Positions in ``documents`` of the evidence, where it is known."""
    history: tuple[tuple[str, str], ...] = ()
    """Earlier turns as (role, text)."""

    @classmethod
    def made(
        cls,
        set: str,
        number: str,
        kind: str,
        text: str,
        answer: str,
        documents: Sequence[str],
        supporting: Sequence[int],
    ) -> Question:
        """One that was made and not read: of one answer, with a known evidence."""
        return cls(
            id=f"{set}-{number}",
            set=set,
            kind=kind,
            text=text,
            answers=(answer,),
            documents=tuple(documents),
            supporting=tuple(supporting),
        )

    def with_documents(self, count: int) -> Question:
        """The question over at most ``count`` of its documents: the evidence, then the first others, in order."""
        if len(self.documents) <= count:
            return self
        others = (place for place in range(len(self.documents)) if place not in self.supporting)
        kept = sorted([*self.supporting, *others][:count])
        supporting = tuple(kept.index(place) for place in self.supporting if place in kept)
        return replace(self, documents=tuple(self.documents[place] for place in kept), supporting=supporting)


def read_questions(
    files: Iterable[str | Path], *, limit: int | None = None, documents: int | None = None
) -> list[Question]:
    """The questions of files, or of the ``.jsonl`` files of folders, in their order.

    Rows without an accepted answer are left out: there is nothing to measure against.

    Args:
        files: files and folders.
        limit: at most so many of each file, evenly spread over it.
        documents: at most so many a question; all when not given.

    Raises:
        ConfigError: a file that can't be read, or a row of neither format.
    """
    questions: list[Question] = []
    for file in _files(files):
        rows = [question for question in _read(file) if question.answers]
        if limit is not None and limit < len(rows):
            rows = [rows[place * len(rows) // limit] for place in range(limit)]
        questions += rows
    if not questions:
        raise ConfigError("There are no questions with an accepted answer in the given files.")
    return questions if documents is None else [question.with_documents(documents) for question in questions]


def _files(given: Iterable[str | Path]) -> list[Path]:
    files: list[Path] = []
    for path in map(Path, given):
        inside = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not inside:
            raise ConfigError(f"The folder {path} holds no .jsonl file.")
        files += inside
    return files


def _read(file: Path) -> list[Question]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The questions in {file} can't be read: {error}.") from error
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            questions.append(_question(row, file.stem, f"{file.stem}-{number}"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"Line {number} of {file} is no question: give JSON with question, answers and chunks, or with "
                f"LongBench's input, context and answers ({type(error).__name__}: {error})."
            ) from error
    return questions


def _question(row: Mapping[str, Any], name: str, fallback: str) -> Question:
    accepted = row["answers"]
    several = [accepted] if isinstance(accepted, str) else accepted
    answers = tuple(str(answer).strip() for answer in several if str(answer).strip())
    if "context" in row:
        return Question(
            id=str(row.get("_id") or fallback),
            set=name,
            kind=str(row.get("dataset") or "question"),
            text=str(row["input"]),
            answers=answers,
            documents=tuple(part.strip() for part in _PASSAGE.split(row["context"]) if part.strip()),
        )
    return Question(
        id=str(row.get("id") or fallback),
        set=name,
        kind=str(row.get("kind") or "question"),
        text=str(row["question"]),
        answers=answers,
        documents=tuple(_document(chunk) for chunk in row["chunks"]),
        supporting=tuple(int(place) for place in row.get("supporting") or ()),
        history=_history(row.get("history") or ()),
    )


def _document(chunk: Mapping[str, str]) -> str:
    title, text = (chunk.get("title") or "").strip(), chunk["text"].strip()
    return f"{title}\n{text}" if title else text


def _history(turns: Sequence[Mapping[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple((_ROLES[(turn.get("role") or turn["speaker"]).lower()], turn["text"]) for turn in turns)


__all__ = ["Question", "read_questions"]
