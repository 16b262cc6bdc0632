"""ServedTokenizer: the server's tokenizer, as far as this package asks one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from kvblend_rag.client.connection import Connection

_REMEMBERED = 4096


class ServedTokenizer:
    """Encodes and decodes over the server's ``/tokenize`` and ``/detokenize``; what was asked lately is remembered.

    Args:
        connection: to the server.
        model: its name there.
        chat_template: the server's.
    """

    def __init__(self, connection: Connection, model: str, chat_template: str) -> None:
        self._connection, self._model = connection, model
        self.chat_template = chat_template
        self._encoded = lru_cache(_REMEMBERED)(self._encode)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return list(self._encoded(text, add_special_tokens))

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids."""
        ids = [int(token) for token in token_ids]
        return str(self._ask("detokenize", {"tokens": ids})["prompt"]) if ids else ""

    def apply_chat_template(
        self, conversation: Sequence[Any], tools: Sequence[Any] | None = None, **options: Any
    ) -> str | list[int]:
        """A conversation as the server renders it, as text unless ``tokenize`` is asked for."""
        tokenize = options.pop("tokenize", False)
        options.pop("return_dict", None)
        ids = self.conversation(conversation, tools or (), **options)
        return ids if tokenize else self.decode(ids)

    def conversation(self, messages: Sequence[Any], tools: Sequence[Any], **template: Any) -> list[int]:
        """Token ids of a conversation, rendered by the server."""
        more = template.pop("add_generation_prompt", True)
        body: dict[str, Any] = {
            "messages": [dict(each) for each in messages],
            "add_generation_prompt": more,
            "chat_template_kwargs": template,
        }
        if tools:
            body["tools"] = [dict(each) for each in tools]
        return [int(token) for token in self._ask("tokenize", body)["tokens"]]

    def _encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        body = {"prompt": text, "add_special_tokens": add_special_tokens}
        return tuple(int(token) for token in self._ask("tokenize", body)["tokens"])

    def _ask(self, what: str, body: dict[str, Any]) -> Any:
        return self._connection.post(f"{self._connection.root}/{what}", {"model": self._model, **body})


__all__ = ["ServedTokenizer"]
