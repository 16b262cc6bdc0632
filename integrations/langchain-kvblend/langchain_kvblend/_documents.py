"""Documents as they will stand in a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from langchain_core.documents import Document
from langchain_core.prompts import BasePromptTemplate, format_document

DocumentText: TypeAlias = "BasePromptTemplate[str] | Callable[[Document], str]"
"""How a chain writes a document into a prompt."""


def text_of(document: Document, document_prompt: DocumentText | None = None) -> str:
    """The text of a document in a prompt.

    Args:
        document: what is written.
        document_prompt: the chain's ``document_prompt``, or a function; None: the page's content alone.
    """
    if document_prompt is None:
        return document.page_content
    if isinstance(document_prompt, BasePromptTemplate):
        return format_document(document, document_prompt)
    return document_prompt(document)


def texts_of(documents: Sequence[Document], document_prompt: DocumentText | None = None) -> list[str]:
    """The texts of several documents."""
    return [text_of(document, document_prompt) for document in documents]


__all__ = ["DocumentText", "text_of", "texts_of"]
