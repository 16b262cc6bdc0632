"""A batch of prompts with their chunks: which token stands where, and which token sees which."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvblend_rag.config import BlendConfig

SPAN = BlendConfig.span_size
"""Chunk tokens are recomputed in spans of so many."""


@dataclass
class Prompt:
    """Token ids of one question: what stands before the chunks, the chunks, what stands between them, and the rest.

    ``answer`` ends with the end of the turn. ``evidence`` says which chunks hold the answer.
    """

    head: list[int]
    chunks: list[list[int]]
    separator: list[int]
    tail: list[int]
    answer: list[int]
    evidence: list[int]

    def ids(self) -> list[int]:
        """The whole of it, without the answer's last token, which nothing is predicted from."""
        body = list(self.head)
        for place, chunk in enumerate(self.chunks):
            body += [*(self.separator if place else []), *chunk]
        return [*body, *self.tail, *self.answer[:-1]]

    def wanted(self) -> range:
        """Places in ``ids`` at which the answer's tokens are predicted."""
        total = len(self.ids())
        return range(total - len(self.answer), total)


def recomputed(prompt: Prompt, ratio: float, way: str, draw: random.Random) -> list[list[bool]]:
    """Which tokens of each chunk are recomputed.

    Args:
        prompt: one.
        ratio: of the chunks' tokens.
        way: ``first``, the first tokens of each chunk; ``spans``, spans anywhere; ``evidence``, those of the chunks
            with the answer before all others.
        draw: draws the spans.
    """
    flags = [[False] * len(chunk) for chunk in prompt.chunks]
    if way == "first":
        for row in flags:
            row[: round(len(row) * ratio)] = [True] * round(len(row) * ratio)
        return flags
    left = round(sum(map(len, flags)) * ratio)
    spans = [(place, at) for place, row in enumerate(flags) for at in range(0, len(row), SPAN)]
    draw.shuffle(spans)
    if way == "evidence":
        spans.sort(key=lambda span: span[0] not in prompt.evidence)
    for place, at in spans:
        if left <= 0:
            break
        row = flags[place]
        count = min(SPAN, len(row) - at)
        row[at : at + count] = [True] * count
        left -= count
    return flags


@dataclass
class Batch:
    """Prompts as one flat run of tokens (context, chunks, live) and the rows that attention gathers from it.

    ``chunk_*``: tokens as ingested, each chunk behind the context. ``live_*``: tokens of the prompt's own pass, that
    is all that are in no chunk, the recomputed ones and the answer. ``seen_rows`` gathers, a row a prompt, out of
    chunk and live tokens together. ``*_back`` finds a flat token in the padded rows. Masks are added to the scores.
    """

    context: Tensor
    chunk_ids: Tensor
    chunk_offsets: Tensor
    chunk_positions: Tensor
    chunk_rows: Tensor
    chunk_back: Tensor
    chunk_mask: Tensor
    live_ids: Tensor
    live_positions: Tensor
    live_rows: Tensor
    live_back: Tensor
    seen_rows: Tensor
    live_mask: Tensor
    wanted: Tensor


def blended_batch(
    prompts: Sequence[Prompt],
    flags: Sequence[list[list[bool]]],
    context: Sequence[int],
    device: str,
    dtype: torch.dtype,
) -> Batch:
    """Prompts whose chunks were computed behind the context.

    Args:
        prompts: of any lengths.
        flags: which tokens of each prompt's chunks are recomputed.
        context: token ids of the ingest context.
        device: where to.
        dtype: of the masks, the model's own.
    """
    chunk_ids: list[int] = []
    chunk_offsets: list[int] = []
    chunk_positions: list[int] = []
    kept: list[bool] = []
    chunk_places: list[range] = []
    live_ids: list[int] = []
    live_positions: list[int] = []
    live_places: list[range] = []
    stored_places: list[range] = []
    wanted: list[int] = []
    for prompt, chosen in zip(prompts, flags, strict=True):
        first_chunk, first_live = len(chunk_ids), len(live_ids)
        live = list(prompt.head)
        positions = list(range(len(live)))
        at = len(live)
        for place, (chunk, row) in enumerate(zip(prompt.chunks, chosen, strict=True)):
            if place:
                live += prompt.separator
                positions += range(at, at + len(prompt.separator))
                at += len(prompt.separator)
            chunk_places.append(range(len(chunk_ids), len(chunk_ids) + len(chunk)))
            chunk_ids += chunk
            chunk_offsets += range(len(chunk))
            chunk_positions += range(at, at + len(chunk))
            kept += [not again for again in row]
            live += [token for token, again in zip(chunk, row, strict=True) if again]
            positions += [at + offset for offset, again in enumerate(row) if again]
            at += len(chunk)
        ending = [*prompt.tail, *prompt.answer[:-1]]
        live += ending
        positions += range(at, at + len(ending))
        live_ids += live
        live_positions += positions
        live_places.append(range(first_live, len(live_ids)))
        stored_places.append(range(first_chunk, len(chunk_ids)))
        wanted += range(len(live_ids) - len(prompt.answer), len(live_ids))
    total = len(chunk_ids)
    chunk_rows, chunk_there = _rows(chunk_places)
    live_rows, live_there = _rows(live_places)
    seen_rows, seen_there = _rows(
        [[*stored, *(total + place for place in live)] for stored, live in zip(stored_places, live_places, strict=True)]
    )

    def there(values: Sequence[int] | Tensor) -> Tensor:
        return torch.as_tensor(values).to(device, non_blocking=True)

    def mask(sees: Tensor) -> Tensor:
        return torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(~sees, float("-inf"))

    every = torch.tensor([*chunk_positions, *live_positions])
    visible = torch.tensor([*kept, *([True] * len(live_ids))])
    length = chunk_rows.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    chunk_sees = torch.cat([torch.ones(length, len(context), dtype=torch.bool, device=device), causal], dim=1)
    asks, stands = there(torch.tensor(live_positions)[live_rows]), there(every[seen_rows])
    live_sees = (stands[:, None, :] <= asks[:, :, None]) & there(visible[seen_rows] & seen_there)[:, None, :]
    return Batch(
        context=there(list(context)),
        chunk_ids=there(chunk_ids),
        chunk_offsets=there(chunk_offsets),
        chunk_positions=there(chunk_positions),
        chunk_rows=there(chunk_rows),
        chunk_back=there(chunk_there.flatten().nonzero().flatten()),
        chunk_mask=mask(chunk_sees)[None, None],
        live_ids=there(live_ids),
        live_positions=there(live_positions),
        live_rows=there(live_rows),
        live_back=there(live_there.flatten().nonzero().flatten()),
        seen_rows=there(seen_rows),
        live_mask=mask(live_sees)[:, None],
        wanted=there(wanted),
    )


def full_batch(prompts: Sequence[Prompt], device: str) -> tuple[Tensor, Tensor]:
    """Token ids, (prompts, tokens), padded behind; and the places in all of them at which answers are predicted."""
    ids = [prompt.ids() for prompt in prompts]
    longest = -(-max(map(len, ids)) // 8) * 8
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    wanted = [place + longest * row for row, prompt in enumerate(prompts) for place in prompt.wanted()]
    return padded.to(device, non_blocking=True), torch.tensor(wanted).to(device, non_blocking=True)


def _rows(places: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of equal length, a multiple of 8 as the fast attention kernels want it, and what of them is not padding."""
    longest = -(-max(map(len, places)) // 8) * 8
    rows = torch.tensor([[*row, *([row[0]] * (longest - len(row)))] for row in places])
    lengths = torch.tensor([len(row) for row in places])
    return rows, torch.arange(longest)[None] < lengths[:, None]
