"""A tokenizer whose tokens are words, for models with random weights: a server has texts to read and to write."""

from __future__ import annotations

import json
import string
from pathlib import Path

_DIGITS = string.digits + string.ascii_letters
_UNKNOWN = "<unknown>"
"""Longer than any other word with its space: vLLM refuses prompts of more letters than its tokens could stand for."""


def word(token: int) -> str:
    """The word of a token id other than 0, three letters and digits."""
    rest, last = divmod(token, len(_DIGITS))
    first, middle = divmod(rest, len(_DIGITS))
    return _DIGITS[first] + _DIGITS[middle] + _DIGITS[last]


def write_word_tokenizer(folder: Path, size: int) -> None:
    """Write a tokenizer of so many words beside a model's configuration; 0 is unknown, 1 and 2 begin and end a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({_UNKNOWN: 0, **{word(token): token for token in range(1, size)}}, _UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": _UNKNOWN,
        "bos_token": word(1),
        "eos_token": word(2),
        "model_max_length": 1 << 20,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


__all__ = ["word", "write_word_tokenizer"]
