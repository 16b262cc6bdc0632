"""The prompt the reader was made for; other models understand it as well."""

from __future__ import annotations

from collections.abc import Sequence

from kvblend_rag.demo.library import Document
from kvblend_rag.quality.prompt import conversation

SYSTEM_PROMPT = "Answer the question from the documents. Give only the answer, in a few words."
UNANSWERABLE = "Not in the documents."
"""What the reader says when no document holds the answer."""


def messages(question: str, documents: Sequence[Document]) -> list[dict[str, str]]:
    """Chat messages: the documents in the given order, joined by a blank line, then the question."""
    return conversation(question, [document.content for document in documents], SYSTEM_PROMPT)


__all__ = ["SYSTEM_PROMPT", "UNANSWERABLE", "messages"]
