"""Carry: what recomputing some of a chunk's tokens changed in their KV, for the tokens that are left as stored.

A chunk was computed behind other text than it stands behind now, and part of what that does to its KV is the same
from token to token. The recomputed tokens show it, so their mean change is a good guess for the others; of a few
tokens that disagree it is a bad one, and is shrunk by how much they do (positive-part James-Stein, in Efron and
Morris, JASA 68, 1973).
"""

from __future__ import annotations

import torch

_PRIOR_TOKENS = 16
"""The mean over all chunks counts as much as so many tokens of a chunk's own: a span of the default length."""


def carried(changes: torch.Tensor, chunk: torch.Tensor, chunks: int) -> torch.Tensor:
    """By how much the KV of each chunk's other tokens is to be changed: (chunks, heads, head_dim) float32.

    Args:
        changes: (tokens, heads, head_dim) float32, a recomputed token's keys or values less its stored ones, keys
            turned to one position; at least one token.
        chunk: (tokens,) int64, the chunk each token is of.
        chunks: how many there are; those without a token are guessed from the others.
    """
    counts = torch.zeros(chunks, device=changes.device).index_add_(0, chunk, torch.ones_like(chunk, dtype=torch.float))
    sums = torch.zeros(chunks, *changes.shape[1:], device=changes.device).index_add_(0, chunk, changes)
    counts = counts[:, None, None]
    means = (sums + _PRIOR_TOKENS * changes.mean(dim=0)) / (counts + _PRIOR_TOKENS)
    spread = (changes - means[chunk]).square().sum(dim=-1, keepdim=True).sum(dim=0) / max(len(changes) - 1, 1)
    noise = spread / counts.clamp_min(1)
    return means * (1 - noise / means.square().sum(dim=-1, keepdim=True).clamp_min(1e-9)).clamp_min(0)


__all__ = ["carried"]
