"""How much attention each key of paged caches gets from a few queries: softmax, summed over queries and layers.

Two passes over the keys, read from the cache where they lie: the first finds each query's normaliser, the
second adds up the probabilities by key. No matrix of logits is ever stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvblend_rag.kernels.paged_caches import PagedCaches

_KEYS = 64
"""Keys in a tile."""

_ROWS = 64
"""Query rows in a tile."""


@triton.jit
def _logits(
    queries,
    limits,
    addresses,
    table,
    row,
    rows,
    key,
    keys,
    head,
    kv_heads,
    block_stride,
    head_stride,
    token_stride,
    block_size,
    scale,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):
    """One tile: (rows, keys) float32, minus infinity where a query must not see a key.

    ``head`` counts through the key heads of all layers.
    """
    layer, kv_head = head // kv_heads, head % kv_heads
    # Said, since of an address out of memory the compiler can't know it.
    cache = tl.multiple_of(tl.load(addresses + layer).to(queries.dtype), 16)
    dim = tl.arange(0, DIM_PADDED)
    q = tl.load(
        queries + (head * rows + row)[:, None] * DIM + dim[None, :],
        mask=(row < rows)[:, None] & (dim < DIM)[None, :],
        other=0.0,
    )
    block = tl.load(table + key // block_size, mask=key < keys, other=0).to(tl.int64)
    where = block * block_stride + (key % block_size) * token_stride + kv_head * head_stride
    k = tl.load(cache + where[None, :] + dim[:, None], mask=(key < keys)[None, :] & (dim < DIM)[:, None], other=0.0)
    limit = tl.load(limits + row, mask=row < rows, other=-1)
    seen = (key[None, :] <= limit[:, None]) & (key < keys)[None, :]
    return tl.where(seen, tl.dot(q, k) * scale, float("-inf"))


# Not by a prompt's and a question's length: each kind of number would be compiled when it first comes.
@triton.jit(do_not_specialize=["rows", "keys", "keys_per_part"])
def _normalisers(
    queries,
    limits,
    addresses,
    table,
    partial_max,
    partial_sum,
    rows,
    keys,
    kv_heads,
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
    part, head, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    parts = tl.num_programs(0)
    row = tile * ROWS + tl.arange(0, ROWS)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(part * keys_per_part, tl.minimum((part + 1) * keys_per_part, keys), KEYS):
        key = start + tl.arange(0, KEYS)
        logits = _logits(
            queries, limits, addresses, table, row, rows, key, keys, head, kv_heads,
            block_stride, head_stride, token_stride, block_size, scale, DIM, DIM_PADDED,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        # A row that has seen no key yet has no maximum to subtract.
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(logits - safe[:, None]), axis=1)
        top = new_top
    at = (head * rows + row) * parts + part
    tl.store(partial_max + at, top, mask=row < rows)
    tl.store(partial_sum + at, total, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "keys"])
def _masses(
    queries,
    limits,
    addresses,
    table,
    normaliser,
    weights,
    out,
    rows,
    keys,
    kv_heads,
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
    part, head = tl.program_id(0), tl.program_id(1)
    key = part * KEYS + tl.arange(0, KEYS)
    every = tl.zeros([KEYS], tl.float32)
    last = tl.zeros([KEYS], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        logits = _logits(
            queries, limits, addresses, table, row, rows, key, keys, head, kv_heads,
            block_stride, head_stride, token_stride, block_size, scale, DIM, DIM_PADDED,
        )  # fmt: skip
        norm = tl.load(normaliser + head * rows + row, mask=row < rows, other=float("inf"))
        probability = tl.exp(logits - norm[:, None])
        every += tl.sum(probability, axis=0)
        is_last = tl.load(weights + row, mask=row < rows, other=0.0)
        last += tl.sum(probability * is_last[:, None], axis=0)
    tl.store(out + head * keys + key, every, mask=key < keys)
    tl.store(out + (tl.num_programs(1) + head) * keys + key, last, mask=key < keys)


def column_mass(
    queries: torch.Tensor,
    positions: torch.Tensor,
    caches: PagedCaches,
    addresses: torch.Tensor,
    table: torch.Tensor,
    keys: int,
    scale: float,
) -> torch.Tensor:
    """(2, keys) float32: attention on each key, mean over heads, summed over layers; mean over all queries, and of
    the last alone.

    Args:
        queries: (layers, queries, heads, head_dim), in the caches' dtype.
        positions: (queries,) int64; a query sees the keys up to its own position.
        caches: how a layer's cache is laid out.
        addresses: (layers,) int64, on the device: ``PagedCaches.addresses_of`` these layers.
        table: (blocks of the request,) int32, in the caches' blocks.
        keys: how many there are, from position 0.
        scale: of the logits.
    """
    layers, count, heads, dim = queries.shape
    kv_heads = caches.heads
    group = heads // kv_heads
    every_head = layers * kv_heads
    # (layers × kv_heads, queries × group, dim): the heads that share a key head share its tiles.
    grouped = (
        queries.unflatten(2, (kv_heads, group)).transpose(1, 2).reshape(every_head, count * group, dim).contiguous()
    )
    limits = positions.repeat_interleave(group)
    is_last = (limits == positions.max()).float()
    rows = count * group
    layout = (*caches.strides, caches.block_size, scale)
    sizes = {
        "DIM": dim,
        "DIM_PADDED": triton.next_power_of_2(dim),
        "ROWS": _ROWS,
        "KEYS": _KEYS,
    }
    parts = max(1, min(64, triton.cdiv(keys, 8 * _KEYS)))
    keys_per_part = triton.cdiv(triton.cdiv(keys, parts), _KEYS) * _KEYS
    tops = torch.empty(every_head, rows, parts, device=queries.device)
    sums = torch.empty_like(tops)
    grid = (parts, every_head, triton.cdiv(rows, _ROWS))
    asked = (grouped, limits, addresses, table)
    _normalisers[grid](*asked, tops, sums, rows, keys, kv_heads, keys_per_part, *layout, **sizes)
    normaliser = torch.logsumexp(tops + sums.log(), dim=-1)
    out = torch.empty(2, every_head, keys, device=queries.device)
    _masses[(triton.cdiv(keys, _KEYS), every_head)](
        *asked, normaliser, is_last, out, rows, keys, kv_heads, *layout, **sizes
    )
    masses = out.sum(dim=1) / heads
    masses[0] /= count
    return masses


__all__ = ["column_mass"]
