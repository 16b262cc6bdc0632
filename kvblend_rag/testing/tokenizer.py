"""WordTokenizer: the interface of a Transformers tokenizer over words, with the seams of real ones."""

from __future__ import annotations

import json
import re
import threading
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

_PIECES = re.compile(
    r"<\|\w+\|>|</?think>|</?tool_call>"
    r"|[.!?]+\n+|\n+| ?\w+| ?[^\w\s]| +(?= )|\s"
)
"""A full stop and the newlines behind it are one token, a space belongs to the word behind it: as in
byte-pair tokenizers, so that a chunk's ends differ in context."""


class WordTokenizer:
    """Words are tokens; ids are their checksums, so they are the same in every process.

    Args:
        dummy_space: put a space in front of a text, as SentencePiece does.
        tools: the chat template knows tools; else their descriptions must go into the system message.
        escape_results: the chat template passes tools' results through ``tojson``.
        thinking: the chat template speaks of ``<think>``, so a reasoning parser is chosen.
    """

    bos_token_id: int | None = None
    bos_token: str | None = None
    eos_token = "<|im_end|>"
    is_fast = True

    _lock = threading.Lock()
    _texts: dict[int, str] = {}  # noqa: RUF012 (one vocabulary for all on purpose)
    _ids: dict[str, int] = {}  # noqa: RUF012

    def __init__(
        self,
        *,
        dummy_space: bool = False,
        tools: bool = True,
        escape_results: bool = False,
        thinking: bool = False,
    ) -> None:
        self._dummy_space, self._tools, self._escape_results = dummy_space, tools, escape_results
        marks = ["<|im_start|>"]
        marks += ["<tool_call>"] if tools else []
        marks += ["<think> enable_thinking"] if thinking else []
        self.chat_template = " ".join(marks)
        self.eos_token_id = self._id(self.eos_token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; there are no special tokens to add."""
        if self._dummy_space and text and not text.startswith("<|"):
            text = " " + text
        return [self._id(piece) for piece in _PIECES.findall(text)]

    def decode(self, token_ids: Sequence[int] | int, skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        pieces = [self._texts.get(int(token), "\ufffd") for token in ids]
        if skip_special_tokens:
            pieces = [piece for piece in pieces if not (piece.startswith("<|") and piece.endswith("|>"))]
        text = "".join(pieces)
        return text[1:] if self._dummy_space and text.startswith(" ") else text

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        *,
        tokenize: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **options: Any,
    ) -> Any:
        """ChatML, with tools as Qwen2.5 writes them."""
        turns = []
        described = "\n".join(json.dumps(tool) for tool in tools or () if self._tools)
        messages = list(conversation)
        if described:
            system = messages.pop(0)["content"] + "\n\n" if messages and messages[0]["role"] == "system" else ""
            turns.append(("system", f"{system}# Tools\n\n<tools>\n{described}\n</tools>"))
        for message in messages:
            role, content = message["role"], message.get("content") or ""
            if self._tools and role == "tool":
                content = json.dumps(content, ensure_ascii=False) if self._escape_results else content
                role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
            for call in message.get("tool_calls", ()):
                content += f"\n<tool_call>\n{json.dumps(call['function'])}\n</tool_call>"
            turns.append((role, content))
        text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
        text += "<|im_start|>assistant\n" if add_generation_prompt else ""
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def get_vocab(self) -> dict[str, int]:
        """Every token seen so far."""
        return dict(self._ids)

    def convert_tokens_to_ids(self, token: str) -> int:
        """The id of one token."""
        return self._id(token)

    def __len__(self) -> int:
        return 1 << 31

    def _id(self, piece: str) -> int:
        known = self._ids.get(piece)
        if known is not None:
            return known
        with self._lock:
            number = zlib.crc32(piece.encode()) & 0x7FFFFFFF
            while self._texts.get(number, piece) != piece:
                number = (number + 1) & 0x7FFFFFFF
            self._texts[number] = piece
            self._ids[piece] = number
            return number


__all__ = ["WordTokenizer"]
