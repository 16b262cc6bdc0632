"""Tokenizers of the two common families, trained on the texts at hand: no model hub is needed for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

_SPECIAL = ("<unk>", "<|im_start|>", "<|im_end|>")
# Qwen2's: a full stop and the newlines behind it become one token, as in Llama 3's and OpenAI's.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained_tokenizer(family: Literal["byte-pair", "sentencepiece"], texts: Sequence[str], chat_template: str) -> Any:
    """A tokenizer for ``fake_kvblend``; needs Transformers and takes a second.

    Args:
        family: ``byte-pair`` joins a chunk's last full stop with the newlines behind it into one token;
            ``sentencepiece`` puts a space in front of every text, as Llama 2's and Mistral's do.
        texts: what it is trained on.
        chat_template: Jinja, as Transformers takes it; ``<|im_start|>`` and ``<|im_end|>`` are special tokens.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    corpus = [*texts, *["A sentence.\n\nAnother.\n\nA third one.\n\n---\n"] * 20]
    trainer: Any
    if family == "byte-pair":
        made = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(_WORDS), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=3000,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=list(_SPECIAL),
            show_progress=False,
        )
    else:
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
        made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
        fallback = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=3000, special_tokens=[*_SPECIAL, *fallback], show_progress=False)
    made.train_from_iterator(corpus, trainer)
    made.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in _SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", eos_token="<|im_end|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = chat_template
    return tokenizer


__all__ = ["trained_tokenizer"]
