"""Splits a text that is too long for one chunk, where a reader would."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

# A cut leaves a single space with the word behind it and newlines with the sentence before them, as
# byte-pair tokenizers do: then the pieces tokenise as the whole text does, and no seam is left over.
_BOUNDARIES = tuple(
    re.compile(pattern)
    for pattern in (
        r"\n\s*\n",
        r"[.!?…]+[\"')\]»”’]*(?:\n|(?=[ \t]))|[。！？]+[」』”’）]*",
        r"\n",
        r"(?=[ \t])(?<![ \t])",
    )
)
"""Paragraph, sentence, line, word: the right piece starts where the match ends."""

_FILL = 0.9
"""Share of the longest piece that is aimed at, so that a boundary can be waited for."""

_SLACK = 0.6
"""Share of the length aimed at below which no boundary is worth it."""

_LIMIT = 0.97
"""Share beyond which nothing is tried: another part of the text may have shorter tokens."""


def split_text(text: str, count_tokens: Callable[[str], int], max_tokens: int, min_tokens: int = 16) -> list[str]:
    """Pieces of about equal length, none above ``max_tokens``, together the text.

    Cuts are made behind a paragraph, else a sentence, else a line, else a word. Blank pieces are left
    out; but for them the pieces, joined, are the text. A piece below ``min_tokens`` joins its neighbour
    where both fit into one.

    Args:
        text: any text.
        count_tokens: the tokenizer. It is called on the whole text once, and about once a piece.
        max_tokens: the longest piece, in tokens.
        min_tokens: the shortest piece that can be found again in a prompt, in tokens.

    Raises:
        ValueError: ``max_tokens`` below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, and must be at least 1.")
    pieces: list[tuple[str, int]] = []
    for piece, tokens in _pieces(text, count_tokens, max_tokens):
        if not pieces or min(tokens, pieces[-1][1]) >= min_tokens:
            pieces.append((piece, tokens))
            continue
        joined = pieces[-1][0] + piece
        total = count_tokens(joined)
        if total <= max_tokens:
            pieces[-1] = (joined, total)
        else:
            pieces.append((piece, tokens))
    return [piece for piece, _ in pieces if piece.strip()]


def _pieces(text: str, count_tokens: Callable[[str], int], max_tokens: int) -> list[tuple[str, int]]:
    """Pieces with their token counts, in order."""
    tokens = count_tokens(text)
    # one character that is more than max_tokens can't be helped; blank pieces are dropped in the end
    if tokens <= max_tokens or len(text) < 2 or not text.strip():
        return [(text, tokens)]
    found = []
    for piece in _cut(text, len(text) * max_tokens / tokens):
        found += _pieces(piece, count_tokens, max_tokens)
    return found


def _cut(text: str, longest: float) -> list[str]:
    """At least two pieces of at most about ``longest`` characters, by length alone."""
    pieces: list[str] = []
    start = 0
    while not pieces or len(text) - start > longest:
        left = len(text) - start
        length = left / max(math.ceil(left / (_FILL * longest)), 2)
        shortest = _SLACK * length
        stop = _boundary(
            text,
            low=start + max(round(shortest), 1),
            target=start + max(round(length), 1),
            # never so far that a crumb is left
            high=start + min(max(round(min(_LIMIT * longest, left - shortest)), 1), left - 1),
        )
        pieces.append(text[start:stop])
        start = stop
    return [*pieces, text[start:]]


def _boundary(text: str, low: int, target: int, high: int) -> int:
    """The cut in ``[low, high]`` at the strongest boundary, the nearest to ``target`` of these."""
    for pattern in _BOUNDARIES:
        # from a little before: a boundary may begin there and end inside
        cuts = [found.end() for found in pattern.finditer(text, max(low - 4, 0), min(high + 1, len(text)))]
        cuts = [cut for cut in cuts if low <= cut <= high]
        if cuts:
            return min(cuts, key=lambda cut: abs(cut - target))
    return min(max(target, 1), len(text) - 1)


__all__ = ["split_text"]
