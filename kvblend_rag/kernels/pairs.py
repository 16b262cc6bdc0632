"""Pairs: which dimensions of a head a rotation turns together, for kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pairs(dim, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Of each dimension the other half of its pair, its sign in the rotation, and which frequency turns it."""
    if INTERLEAVED:
        partner = dim ^ 1
        sign = tl.where(dim % 2 == 0, -1.0, 1.0)
        frequency = dim // 2
    else:
        partner = tl.where(dim < HALF, dim + HALF, dim - HALF)
        sign = tl.where(dim < HALF, -1.0, 1.0)
        frequency = dim % HALF if HALF > 0 else dim
    return partner, sign, frequency


__all__ = ["pairs"]
