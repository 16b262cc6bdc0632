"""Which retrieved nodes an answer's prompt reused, and why not the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llama_index.core.base.llms.types import ChatResponse, CompletionResponse
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.instrumentation import get_dispatcher
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
        which_found(handle_of(kv), answer.raw["report"], texts, answer.raw["prompt_token_ids"])
        for answer in several
        if _is_ours(answer)
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
    handlers = get_dispatcher().event_handlers
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
        if isinstance(event, (LLMChatEndEvent, LLMCompletionEndEvent)) and _is_ours(event.response):
            self._answers.append(event.response)


def _is_ours(answer: Any) -> bool:
    raw = getattr(answer, "raw", None)
    return isinstance(raw, dict) and "report" in raw and "prompt_token_ids" in raw


__all__ = ["found_nodes", "watch_answers"]
