"""Examples as the reader's prompts, in token ids, and batches of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from kvblend_rag.demo.prompt import SYSTEM_PROMPT, UNANSWERABLE
from kvblend_rag.quality.prompt import conversation
from tools.reader.batch import Prompt
from tools.reader.examples import Example

ANSWER_TOKENS = 48
PROMPT_TOKENS = 3200
CHUNK_TOKENS = 384
"""Longer documents are cut: rows of a batch are as long as its longest chunk."""

CHUNKS_A_BATCH = 96
LEAST_PROMPTS = 6
DOCUMENTS = (2, 4, 6, 8, 10, 10, 12, 16)
"""In a prompt, drawn for a batch."""

LEFT_OUT = 0.1
"""Of the questions have their evidence left out."""


def chat(tokenizer: Any, documents: list[str], question: str) -> str:
    """The reader's prompt as text."""
    messages = conversation(question, documents, SYSTEM_PROMPT)
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


class Prompts:
    """Examples as token ids, with as many documents as are wanted."""

    def __init__(self, tokenizer: Any) -> None:
        """Args: the reader's tokenizer."""
        mark = "KVBLENDMARK"
        text = chat(tokenizer, [mark], mark)
        head, rest = text.split(mark, 1)
        before, after = rest.split(mark, 1)
        self._encode: Callable[[str], list[int]] = lambda part: tokenizer.encode(part, add_special_tokens=False)
        self._head, self._before, self._after = self._encode(head), before, after
        self._separator = self._encode("\n\n")
        self._end = int(tokenizer.eos_token_id)
        self._known: dict[str, list[int]] = {}

    def made(self, example: Example, documents: int, draw: random.Random) -> Prompt | None:
        """A prompt, or None where it would be too long."""
        answer = example.answer
        shown, evidence = list(example.others), list(example.evidence)
        if not example.whole:
            draw.shuffle(shown)
            if draw.random() < LEFT_OUT:
                answer, evidence = UNANSWERABLE, []
            shown = [*evidence, *shown[: max(documents - len(evidence), 1)]]
            draw.shuffle(shown)
        elif len(shown) > documents:
            shown = shown[:documents]
        prompt = Prompt(
            self._head,
            [self._tokens(text) for text in shown],
            self._separator,
            self._encode(f"{self._before}{example.question}{self._after}"),
            [*self._encode(answer)[:ANSWER_TOKENS], self._end],
            [place for place, text in enumerate(shown) if text in evidence],
        )
        return prompt if len(prompt.ids()) <= PROMPT_TOKENS else None

    def _tokens(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._encode(text)[:CHUNK_TOKENS]
        return self._known[text]


def batches(examples: Iterator[Example], prompts: Prompts, draw: random.Random) -> Iterator[list[Prompt]]:
    """Batches of prompts with equally many documents each, without end."""
    while True:
        documents = draw.choice(DOCUMENTS)
        batch: list[Prompt] = []
        while len(batch) < max(CHUNKS_A_BATCH // documents, LEAST_PROMPTS):
            made = prompts.made(next(examples), documents, draw)
            if made:
                batch.append(made)
        yield batch
