"""Which retrieved nodes an answer's prompt reused, and why not the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llama_index.core import instrumentation
from llama_index.core.base.llms.types import ChatResponse, CompletionResponse
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent, LLMCompletionEndEvent
from llama_index.core.schema import BaseNode, NodeWithScore
from llama_index.llms.kvblend.base import KVBlendLLM
from llama_index.llms.kvblend.nodes import handle_of, prompt_text

from kvblend_rag.documents import DocumentUse, which_found
from kvblend_rag.kvblend import KVBlend

Response = ChatResponse | CompletionResponse


def found_nodes(
    kv: KVBlend | KVBlendLLM, answers: Response | Sequence[Response], nodes: Sequence[NodeWithScore | BaseNode]
) -> list[DocumentUse]:
    """Which nodes were found in a prompt, and why not the others; one entry a node.

    Args:
        kv: engine and store, or a model that has them.
        answers: a response of ``KVBlendLLM``, or the several of one query (``watch_answers``): a node counts where
            most of it was found.
        nodes: as retrieved, such as a query engine's ``response.source_nodes``.
    """
    texts = [prompt_text(node) for node in nodes]
    several = [answers] if isinstance(answers, (ChatResponse, CompletionResponse)) else answers
    uses = [
        which_found(handle_of(kv), raw["report"], texts, raw["prompt_token_ids"])
        for answer in several
        if (raw := _ours(answer)) is not None
    ]
    if not uses:
        raise ValueError("None of these answers came from a KVBlendLLM and to its end.")
    return [max(of_one, key=lambda use: (use.reused, use.tokens)) for of_one in zip(*uses, strict=True)]


@contextmanager
def watch_answers() -> Iterator[list[Response]]:
    """Collects the answers of every ``KVBlendLLM`` within, query engines' and agents' too.

    >>> with watch_answers() as answers:
    ...     response = query_engine.query("…")
    >>> found_nodes(kv, answers, response.source_nodes)
    """
    handler = _Collector()
    handlers = instrumentation.get_dispatcher().event_handlers  # type: ignore[attr-defined]
    handlers.append(handler)
    try:
        yield handler.answers
    finally:
        handlers.remove(handler)


class _Collector(BaseEventHandler):
    _answers: list[Response] = PrivateAttr(default_factory=list)

    @property
    def answers(self) -> list[Response]:
        return self._answers

    def handle(self, event: Any, **kwargs: Any) -> None:
        answer = event.response if isinstance(event, (LLMChatEndEvent, LLMCompletionEndEvent)) else None
        if answer is not None and _ours(answer) is not None:
            self._answers.append(answer)


def _ours(answer: Response) -> dict[str, Any] | None:
    """The raw part of a finished answer of ours."""
    raw = answer.raw
    return raw if isinstance(raw, dict) and "report" in raw and "prompt_token_ids" in raw else None


__all__ = ["found_nodes", "watch_answers"]
