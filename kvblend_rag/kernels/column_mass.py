"""How much attention each key of a paged cache gets from a few queries: softmax, summed over queries.

Two passes over the keys, read from the cache where they lie: the first finds each query's normaliser, the
second adds up the probabilities by key. No matrix of logits is ever stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_KEYS = 64
"""Keys in a tile."""

_ROWS = 64
"""Query rows in a tile."""


@triton.jit
def _logits(
    queries,
    limits,
    cache,
    table,
    row,
    rows,
    key,
    keys,
    kv_head,
    block_stride,
    head_stride,
    token_stride,
    block_size,
    scale,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):
    """One tile: (rows, keys) float32, minus infinity where a query must not see a key."""
    dim = tl.arange(0, DIM_PADDED)
    q = tl.load(
        queries + (kv_head * rows + row)[:, None] * DIM + dim[None, :],
        mask=(row < rows)[:, None] & (dim < DIM)[None, :],
        other=0.0,
    )
    block = tl.load(table + key // block_size, mask=key < keys, other=0).to(tl.int64)
    where = block * block_stride + (key % block_size) * token_stride + kv_head * head_stride
    k = tl.load(cache + where[None, :] + dim[:, None], mask=(key < keys)[None, :] & (dim < DIM)[:, None], other=0.0)
    limit = tl.load(limits + row, mask=row < rows, other=-1)
    seen = (key[None, :] <= limit[:, None]) & (key < keys)[None, :]
    return tl.where(seen, tl.dot(q, k) * scale, float("-inf"))


@triton.jit
def _normalisers(
    queries,
    limits,
    cache,
    table,
    partial_max,
    partial_sum,
    rows,
    keys,
    keys_per_part,
    block_stride,
    head_stride,
    token_stride,
    block_size,
    scale,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    part, kv_head, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    parts = tl.num_programs(0)
    row = tile * ROWS + tl.arange(0, ROWS)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(part * keys_per_part, tl.minimum((part + 1) * keys_per_part, keys), KEYS):
        key = start + tl.arange(0, KEYS)
        logits = _logits(
            queries, limits, cache, table, row, rows, key, keys, kv_head,
            block_stride, head_stride, token_stride, block_size, scale, DIM, DIM_PADDED,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        # A row that has seen no key yet has no maximum to subtract.
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(logits - safe[:, None]), axis=1)
        top = new_top
    at = (kv_head * rows + row) * parts + part
    tl.store(partial_max + at, top, mask=row < rows)
    tl.store(partial_sum + at, total, mask=row < rows)


@triton.jit
def _masses(
    queries,
    limits,
    cache,
    table,
    normaliser,
    weights,
    out,
    rows,
    keys,
    block_stride,
    head_stride,
    token_stride,
    block_size,
    scale,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    part, kv_head = tl.program_id(0), tl.program_id(1)
    key = part * KEYS + tl.arange(0, KEYS)
    every = tl.zeros([KEYS], tl.float32)
    last = tl.zeros([KEYS], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        logits = _logits(
            queries, limits, cache, table, row, rows, key, keys, kv_head,
            block_stride, head_stride, token_stride, block_size, scale, DIM, DIM_PADDED,
        )  # fmt: skip
        norm = tl.load(normaliser + kv_head * rows + row, mask=row < rows, other=float("inf"))
        probability = tl.exp(logits - norm[:, None])
        every += tl.sum(probability, axis=0)
        is_last = tl.load(weights + row, mask=row < rows, other=0.0)
        last += tl.sum(probability * is_last[:, None], axis=0)
    tl.store(out + kv_head * keys + key, every, mask=key < keys)
    tl.store(out + (tl.num_programs(1) + kv_head) * keys + key, last, mask=key < keys)


def column_mass(
    queries: torch.Tensor, positions: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, keys: int, scale: float
) -> torch.Tensor:
    """(2, keys) float32: attention on each key, mean over heads; mean over all queries, and of the last alone.

    Args:
        queries: (queries, heads, head_dim), in the cache's dtype.
        positions: (queries,) int64; a query sees the keys up to its own position.
        cache: (blocks, kv_heads, block_size, 2 * head_dim), keys in the first half of the last dimension.
        table: (blocks of the request,) int32, in the cache's blocks.
        keys: how many there are, from position 0.
        scale: of the logits.
    """
    count, heads, dim = queries.shape
    kv_heads, block_size = cache.shape[1], cache.shape[2]
    group = heads // kv_heads
    # (kv_heads, queries × group, dim): the heads that share a key head share its tiles.
    grouped = queries.unflatten(1, (kv_heads, group)).transpose(0, 1).reshape(kv_heads, count * group, dim).contiguous()
    limits = positions.repeat_interleave(group)
    is_last = (limits == positions.max()).float()
    rows = count * group
    layout = (cache.stride(0), cache.stride(1), cache.stride(2), block_size, scale)
    sizes = {
        "DIM": dim,
        "DIM_PADDED": triton.next_power_of_2(dim),
        "ROWS": _ROWS,
        "KEYS": _KEYS,
    }
    parts = max(1, min(64, triton.cdiv(keys, 8 * _KEYS)))
    keys_per_part = triton.cdiv(triton.cdiv(keys, parts), _KEYS) * _KEYS
    tops = torch.empty(kv_heads, rows, parts, device=cache.device)
    sums = torch.empty_like(tops)
    grid = (parts, kv_heads, triton.cdiv(rows, _ROWS))
    _normalisers[grid](grouped, limits, cache, table, tops, sums, rows, keys, keys_per_part, *layout, **sizes)
    normaliser = torch.logsumexp(tops + sums.log(), dim=-1)
    out = torch.empty(2, kv_heads, keys, device=cache.device)
    _masses[(triton.cdiv(keys, _KEYS), kv_heads)](
        grouped, limits, cache, table, normaliser, is_last, out, rows, keys, *layout, **sizes
    )
    masses = out.sum(dim=1) / heads
    masses[0] /= count
    return masses


__all__ = ["column_mass"]
