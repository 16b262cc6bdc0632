"""A question's prompt: system text, earlier turns, then the documents and the question as one user's turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvblend_rag.engine import Engine
from kvblend_rag.quality.questions import Question


def conversation(
    question: str, documents: Sequence[str], system: str, history: Sequence[tuple[str, str]] = ()
) -> list[dict[str, str]]:
    """Chat messages: the documents in the given order, joined by a blank line, then the question.

    Args:
        question: the last user turn.
        documents: texts, put in as they are.
        system: the system text.
        history: earlier turns as (role, text).
    """
    return [
        {"role": "system", "content": system},
        *({"role": role, "content": text} for role, text in history),
        {"role": "user", "content": "\n\n".join([*documents, f"Question: {question}"])},
    ]


def renderer(engine: Engine, system: str) -> Callable[[Question], list[int]]:
    """Makes prompts in the model's chat template, or, for a model without one, as text that ends in ``Answer:``."""

    def render(question: Question) -> list[int]:
        messages = conversation(question.text, question.documents, system, question.history)
        if engine.template.source:
            return engine.render(messages)
        text = "\n\n".join(message["content"] for message in messages)
        return list(engine.tokenizer.encode(f"{text}\nAnswer:"))

    return render


__all__ = ["conversation", "renderer"]
