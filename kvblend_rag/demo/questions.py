"""Question: what the demo asks, what it expects, and which documents hold the evidence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Question:
    """A question about the bundled documents."""

    question: str
    answers: tuple[str, ...]
    """Any of these is right."""
    evidence: tuple[str, ...]
    """Ids of all documents the answer is drawn from; empty when the documents don't hold it."""


def load_questions() -> list[Question]:
    """The bundled questions, in the order of ``questions.yaml``."""
    entries = yaml.safe_load(Path(__file__).with_name("questions.yaml").read_text(encoding="utf-8"))
    return [
        Question(entry["question"], tuple(map(str, entry["answers"])), tuple(entry["evidence"])) for entry in entries
    ]


__all__ = ["Question", "load_questions"]
