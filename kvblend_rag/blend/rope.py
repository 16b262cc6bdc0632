"""Rotate stored keys from the positions they were computed at to the positions they now stand at.

vLLM stores keys after rotary embedding. A key at position p is ``m * R(p) k`` where the rows of the
model's own table hold ``m cos`` and ``m sin``; so ``R(q) R(p)^-1`` is read off two rows of that very
table. Nothing is assumed about frequencies, scaling or ``m``: every variant whose cache is a table
over positions is served, and the result is the key that the model itself would have stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rotary:
    """How one layer rotates its keys.

    ``table``: (positions, rotary_dim), cosines then sines, in the dtype the model uses them in.
    ``interleaved``: pairs are neighbours (GPT-J) rather than halves (NeoX).
    """

    table: torch.Tensor
    interleaved: bool

    @property
    def dim(self) -> int:
        """How many of a head's dimensions are rotated."""
        return self.table.shape[1]

    def behind(self, dims: int) -> Rotary:
        """The same rotation of dimensions that follow ``dims`` others, which are turned by nothing.

        Args:
            dims: an even number of dimensions in front, such as DeepSeek's latent or position-free part.

        Raises:
            ValueError: pairs are halves, which lie side by side only from a head's first dimension on.
        """
        if not self.interleaved:
            raise ValueError("only neighbouring pairs can be moved behind other dimensions")
        cos, sin = self.table.chunk(2, dim=-1)
        still = cos.new_ones(len(cos), dims // 2)
        return Rotary(torch.cat([still, cos, torch.zeros_like(still), sin], dim=1), interleaved=True)


def shift(rotary: Rotary, stored: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, each (tokens, rotary_dim / 2) float32, that take keys from ``stored`` to ``new``.

    Args:
        rotary: the layer's table.
        stored: (tokens,) int64, the positions at which the keys were computed.
        new: (tokens,) int64, the positions at which they stand now.
    """
    cos_p, sin_p = rotary.table[stored].float().chunk(2, dim=-1)
    cos_q, sin_q = rotary.table[new].float().chunk(2, dim=-1)
    norm = cos_p.square() + sin_p.square()
    return (cos_q * cos_p + sin_q * sin_p) / norm, (sin_q * cos_p - cos_q * sin_p) / norm


def rotate(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """The keys, turned; same shape and dtype, computed in float32.

    Args:
        keys: (..., tokens, kv_heads, head_dim).
        cos: (tokens, rotary_dim / 2) float32, from :func:`shift`.
        sin: the same.
        interleaved: which dimensions make a pair.
    """
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    out = keys.clone()
    if interleaved:
        first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    else:
        first, second = (slice(0, half), slice(half, 2 * half))
    a, b = keys[..., first].float(), keys[..., second].float()
    out[..., first] = (a * cos - b * sin).to(keys.dtype)
    out[..., second] = (b * cos + a * sin).to(keys.dtype)
    return out


__all__ = ["Rotary", "rotate", "shift"]
