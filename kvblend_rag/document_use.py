"""DocumentUse: which retrieved documents were found in a prompt, and why not the others."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kvblend_rag.blend.chunk import TokenIds, as_token_ids
from kvblend_rag.blend.match import ChunkIndex
from kvblend_rag.errors import ChunkRejected
from kvblend_rag.kvblend import KVBlend
from kvblend_rag.report import BlendReport

NOT_INGESTED = "not ingested"
TOO_SHORT = "too short"
CUT = "cut by the splitter"
ESCAPED = "escaped by the chat template"
ABSENT = "not in the prompt"
CACHED = "taken from the exact prefix cache"
OTHER = "the same tokens of another chunk were used"

_SEAM = 2
"""Tokens of a chunk that may read differently where it meets its neighbours, both ends together."""

_PROBE = 40
"""Characters of a text's beginning, middle or end that tell that a part of it is there."""


@dataclass(frozen=True, kw_only=True)
class DocumentUse:
    """What became of one retrieved document in a prompt."""

    found: Literal["fully", "partly", "not"]
    tokens: int
    """Tokens of its chunks that stand in the prompt as they are stored."""
    of: int
    """Tokens of its chunks."""
    reused: int
    """Tokens whose stored KV was used, recomputed ones included."""
    reason: str | None = None
    """Why not all was used: ``not ingested``, ``too short``, ``cut by the splitter``, ``escaped by the chat template``,
    ``not in the prompt``, ``taken from the exact prefix cache``, ``the same tokens of another chunk were used``, or
    what the report says."""


def which_found(
    kv: KVBlend, report: BlendReport, texts: Sequence[str], prompt_token_ids: Sequence[int]
) -> list[DocumentUse]:
    """What became of retrieved texts in a prompt; one entry a text.

    Args:
        kv: that answered.
        report: of the answer.
        texts: as they were ingested.
        prompt_token_ids: of the answer, as in ``ChatResult``.
    """
    refusal = kv.engine.info.refusal
    if refusal is not None:
        return [DocumentUse(found="not", tokens=0, of=0, reused=0, reason=refusal) for _ in texts]
    tokens = as_token_ids(prompt_token_ids)
    cut = [dict(_cut(kv, text)) for text in texts]
    missing = set(kv.catalogue.missing(key for chunks in cut for key in chunks))
    used: dict[str, int] = {}
    for use in report.chunks:
        used[use.key] = used.get(use.key, 0) + use.tokens
    for key, chunk in {key: chunk for chunks in cut for key, chunk in chunks.items()}.items():
        used[key] = sum(used.get(each, 0) for each in kv.keys_of(chunk))
    prompt = str(kv.engine.tokenizer.decode(tokens.tolist()))
    return [
        # One by one: texts that overlap must not take each other's place.
        _one(text, chunks, _covered(chunks, tokens), missing, used, prompt, report)
        for text, chunks in zip(texts, cut, strict=True)
    ]


def _one(
    text: str,
    chunks: dict[str, TokenIds],
    covered: dict[str, int],
    missing: set[str],
    used: dict[str, int],
    prompt: str,
    report: BlendReport,
) -> DocumentUse:
    of = sum(map(len, chunks.values()))
    tokens = sum(covered[key] for key in chunks)
    reused = min(sum(used.get(key, 0) for key in chunks), of)
    whole = bool(chunks) and all(covered[key] >= len(chunk) - _SEAM for key, chunk in chunks.items())
    reason: str | None
    if not chunks:
        reason = TOO_SHORT
    elif missing & chunks.keys():
        reason = NOT_INGESTED
    elif not whole:
        reason = _why_not(text, prompt, bool(tokens))
    elif reused >= tokens - _SEAM * len(chunks):
        reason = None
    else:
        reason = report.reason if not report.blended else None
        reason = CACHED if report.cached_tokens else reason or OTHER
    return DocumentUse(
        found="fully" if whole else "partly" if tokens else "not", tokens=tokens, of=of, reused=reused, reason=reason
    )


def _why_not(text: str, prompt: str, some: bool) -> str:
    text = text.strip()
    middle = len(text) // 2
    parts = {text[:_PROBE], text[middle : middle + _PROBE], text[-_PROBE:]}
    if "\n" in text and any(_escaped(text, plain)[:-1] in prompt for plain in (False, True)):
        return ESCAPED
    return CUT if some or any(part in prompt for part in parts) else ABSENT


def _escaped(text: str, ascii_only: bool) -> str:
    """The text's first two lines, as ``tojson`` writes them."""
    lines = text.splitlines()
    return json.dumps("\n".join(lines[:2])[:200], ensure_ascii=ascii_only)[1:]


def _covered(chunks: dict[str, TokenIds], prompt: TokenIds) -> dict[str, int]:
    """By chunk: how many of its tokens stand in the prompt, wherever and however often."""
    index = ChunkIndex()
    index.add_many(chunks.items())
    marks = {key: np.zeros(len(chunk), np.bool_) for key, chunk in chunks.items()}
    for match in index.match(prompt):
        marks[match.key][match.chunk_start : match.chunk_start + match.length] = True
    return {key: int(mark.sum()) for key, mark in marks.items()}


def _cut(kv: KVBlend, text: str) -> Iterable[tuple[str, TokenIds]]:
    try:
        return kv.cut(text)
    except ChunkRejected:
        return ()


__all__ = ["DocumentUse", "which_found"]
