"""Questions that a small model writes over paragraphs, and the answers that the reader gives them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tools.reader.examples import Example, Paragraphs, content, question_of, writing_prompt
from tools.reader.prompts import chat

QUESTION_TOKENS, ANSWER_TOKENS = 28, 16


class Writer:
    """Texts continued by one of the prepared models."""

    def __init__(self, folder: Path, tokenizer: Any, device: str) -> None:
        """Args: a prepared model, its tokenizer padding in front."""
        self.tokenizer, self.device = tokenizer, device
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()

    def written(self, prompts: list[str], tokens: int, at_once: int) -> list[str]:
        """What follows each prompt, greedily, in so many tokens; so many prompts at once."""
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        made = [""] * len(prompts)
        end = self.tokenizer.eos_token_id
        for at in range(0, len(order), at_once):
            places = order[at : at + at_once]
            asked = self.tokenizer([prompts[place] for place in places], return_tensors="pt", padding=True)
            with torch.inference_mode():
                out = self.model.generate(
                    **asked.to(self.device), max_new_tokens=tokens, pad_token_id=end, do_sample=False
                )
            texts = self.tokenizer.batch_decode(out[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
            for place, text in zip(places, texts, strict=True):
                made[place] = text
        return made


def written_examples(
    paragraphs: Paragraphs, writer: Writer, reader: Writer, draw: random.Random, most: int
) -> list[Example]:
    """Questions that ``writer`` writes, with the answers that ``reader`` gives beside two other documents.

    Args:
        paragraphs: to write over.
        writer: a base model.
        reader: the reader.
        draw: draws the paragraphs and the names that are asked for.
        most: paragraphs.
    """
    about = paragraphs.about()
    draw.shuffle(about)
    asked = [(chunk, beside, prompt) for chunk, beside in about if (prompt := writing_prompt(chunk, draw))][:most]
    texts = writer.written([prompt for *_, prompt in asked], QUESTION_TOKENS, 192)
    made = [
        Example(question, "", [content(chunk)], beside)
        for (chunk, beside, _), text in zip(asked, texts, strict=True)
        if (question := question_of(text, chunk))
    ]
    chats = []
    for example in made:
        shown = [*example.evidence, *draw.sample(example.others, min(2, len(example.others)))]
        draw.shuffle(shown)
        chats.append(chat(reader.tokenizer, shown, example.question))
    for example, answer in zip(made, reader.written(chats, ANSWER_TOKENS, 96), strict=True):
        example.answer = answer.strip()
    return [example for example in made if example.answer]
