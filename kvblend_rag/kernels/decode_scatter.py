"""One pass over encoded KV: decode tiles of tokens, rotate the keys, write both into the paged caches.

``rotate_scatter`` takes KV as computed, a token at a time. Encoded, 32 tokens of a head go together: int4 keeps a key's
channel along tokens, and so a channel's scale is read once for all of them rather than once for each.
Every value is rounded to the caches' dtype before it is turned, as on the host.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from kvblend_rag.kernels.paged_caches import PagedCaches
from kvblend_rag.kernels.pairs import pairs
from kvblend_rag.store.encoding import GROUP, WHOLE_TOKENS, Encoding

_GROUP, _PACKED = tl.constexpr(GROUP), tl.constexpr(GROUP // 2)
_WHOLE = tl.constexpr(WHOLE_TOKENS)
_AHEAD = tl.constexpr(5)
"""Fields of a tile in front of its places."""
PIECES = 7
"""Tensors of the encoding that has most."""
_FIELDS = tl.constexpr(_AHEAD.value + 2 * PIECES)


@triton.jit
def _place(staged, tile, piece, layers):
    """Where a tensor of the tile's chunk begins, so many layers on."""
    at = tile + _AHEAD + 2 * piece
    return staged + tl.load(at) + tl.load(at + 1) * layers


@triton.jit
def _floats(codes, FP8: tl.constexpr):
    """Codes of 8 bits, read as uint8, as float32."""
    if FP8:
        # By hand, since not every GPU has the conversion: e4m3's exponent lies 8 below float16's.
        bits = codes.to(tl.uint16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        number = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), number)
    return codes.to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def _keys(
    staged, tile, layers, row, head, dim, inside,
    ENCODING: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
):  # fmt: skip
    """(rows, dims) float32: the channels in ``dim`` of a group's tokens."""
    there = dim < DIM
    if ENCODING == "int4":
        # A channel's tokens lie side by side, two a byte.
        codes = _place(staged, tile, 1, layers)
        scales = _place(staged, tile, 2, layers).to(tl.pointer_type(tl.float16))
        offsets = _place(staged, tile, 3, layers).to(tl.pointer_type(tl.float16))
        groups = (tl.load(tile + 4) - _WHOLE + _GROUP - 1) // _GROUP
        at = (head * DIM + dim) * groups + tl.load(tile + 3)
        packed = tl.load(codes + at[:, None] * _PACKED + tl.arange(0, _PACKED)[None, :], mask=there[:, None], other=0)
        code = tl.reshape(tl.join(packed & 15, packed >> 4), (DIM_PADDED, _GROUP)).to(tl.float32)
        step = tl.load(scales + at, mask=there, other=0.0).to(tl.float32)
        low = tl.load(offsets + at, mask=there, other=0.0).to(tl.float32)
        keys = tl.trans(code * step[:, None] + low[:, None])
    else:
        codes = _place(staged, tile, 0, layers)
        scales = _place(staged, tile, 1, layers).to(tl.pointer_type(tl.float32))
        code = tl.load(codes + (row * HEADS + head)[:, None] * DIM + dim[None, :], mask=inside, other=0)
        scale = tl.load(scales + head * DIM + dim, mask=there, other=0.0)
        keys = _floats(code, ENCODING == "fp8") * scale[None, :]
    return keys


@triton.jit
def _values(
    staged, tile, layers, row, head, dim, inside, ENCODING: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr
):  # fmt: skip
    """(rows, dims) float32: a group's tokens."""
    at = (row * HEADS + head)[:, None]
    if ENCODING == "int4":
        codes = _place(staged, tile, 4, layers)
        scales = _place(staged, tile, 5, layers).to(tl.pointer_type(tl.float16))
        offsets = _place(staged, tile, 6, layers).to(tl.pointer_type(tl.float16))
        group = at * ((DIM + _GROUP - 1) // _GROUP) + (dim // _GROUP)[None, :]
        packed = tl.load(codes + group * _PACKED + (dim % _GROUP // 2)[None, :], mask=inside, other=0)
        code = tl.where((dim % 2 == 0)[None, :], packed & 15, packed >> 4).to(tl.float32)
        step = tl.load(scales + group, mask=inside, other=0.0).to(tl.float32)
        values = code * step + tl.load(offsets + group, mask=inside, other=0.0).to(tl.float32)
    else:
        codes = _place(staged, tile, 2, layers)
        scales = _place(staged, tile, 3, layers).to(tl.pointer_type(tl.float32))
        code = tl.load(codes + at * DIM + dim[None, :], mask=inside, other=0)
        values = _floats(code, ENCODING == "fp8") * tl.load(scales + at + 0 * dim[None, :], mask=inside, other=0.0)
    return values


@triton.jit
def _decoded(
    staged, tile, layers, row, head, dim, partner, inside, ENCODING: tl.constexpr, DTYPE: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, DIM_PADDED: tl.constexpr,
):  # fmt: skip
    """A group's keys, the other half of each pair of them, and its values, each (rows, dims)."""
    inner = tl.load(tile + 3) * _GROUP + row
    key = _keys(staged, tile, layers, inner, head, dim, inside, ENCODING, HEADS, DIM, DIM_PADDED).to(DTYPE)
    other = key
    if HALF > 0:
        other = _keys(staged, tile, layers, inner, head, partner, inside, ENCODING, HEADS, DIM, DIM_PADDED).to(DTYPE)
    value = _values(staged, tile, layers, inner, head, dim, inside, ENCODING, HEADS, DIM).to(DTYPE)
    return key, other, value


@triton.jit
def _whole(
    staged, tile, layers, row, head, dim, partner, inside, DTYPE: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr
):  # fmt: skip
    """As ``_decoded``, of the tokens that int4 keeps as computed."""
    keys = _place(staged, tile, 0, layers).to(tl.pointer_type(DTYPE)) + (row * HEADS + head)[:, None] * DIM
    values = keys + tl.minimum(tl.load(tile + 4), _WHOLE) * HEADS * DIM
    key = tl.load(keys + dim[None, :], mask=inside, other=0.0)
    other = tl.load(keys + partner[None, :], mask=inside, other=0.0)
    value = tl.load(values + dim[None, :], mask=inside, other=0.0)
    return key, other, value


@triton.jit(do_not_specialize=["first", "passed"], do_not_specialize_on_alignment=["tiles", "slots"])
def _kernel(
    staged,
    tiles,
    slots,
    cos,
    sin,
    addresses,
    first,
    passed,
    block_stride,
    head_stride,
    token_stride,
    block_size,
    ENCODING: tl.constexpr,
    DTYPE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):
    tile = tiles + tl.program_id(0) * _FIELDS
    head = tl.program_id(1)
    layer = tl.program_id(2)
    row = tl.arange(0, _GROUP)
    token = tl.load(tile) + row
    slot = tl.load(slots + token, mask=(row >= tl.load(tile + 1)) & (row < tl.load(tile + 2)), other=-1)
    if tl.max(slot) >= 0:
        layers = passed + layer
        dim = tl.arange(0, DIM_PADDED)
        wanted = (slot >= 0)[:, None]
        inside = wanted & (dim < DIM)[None, :]
        turns = dim < 2 * HALF
        partner, sign, frequency = pairs(dim, HALF, INTERLEAVED)
        partner = tl.where(turns, partner, dim)
        if ENCODING == "int4":
            if tl.load(tile + 3) < 0:
                key, other, value = _whole(
                    staged, tile, layers, row, head, dim, partner, inside, DTYPE, HEADS, DIM
                )  # fmt: skip
            else:
                key, other, value = _decoded(
                    staged, tile, layers, row, head, dim, partner, inside, ENCODING, DTYPE, HEADS, DIM, HALF, DIM_PADDED
                )
        else:
            key, other, value = _decoded(
                staged, tile, layers, row, head, dim, partner, inside, ENCODING, DTYPE, HEADS, DIM, HALF, DIM_PADDED
            )
        if HALF > 0:
            at = token[:, None] * HALF + frequency[None, :]
            c = tl.load(cos + at, mask=wanted & turns[None, :], other=1.0)
            s = tl.load(sin + at, mask=wanted & turns[None, :], other=0.0)
            turned = (key.to(tl.float32) * c + sign[None, :] * other.to(tl.float32) * s).to(DTYPE)
            key = tl.where(turns[None, :], turned, key)
        # Said, since of an address out of memory the compiler can't know it, and would store piece by piece.
        cache = tl.multiple_of(tl.load(addresses + first + layer).to(tl.pointer_type(DTYPE)), 16)
        target = cache + (slot // block_size) * block_stride + (slot % block_size) * token_stride + head * head_stride
        tl.store(target[:, None] + dim[None, :], key, mask=inside)
        tl.store(target[:, None] + DIM + dim[None, :], value, mask=inside)


def tiles_of(
    encoding: Encoding,
    begins: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    chunk_tokens: npt.NDArray[np.int64],
    places: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Tiles of runs of tokens of one encoding, (tiles, fields) int64, in the runs' order, and how many each has.

    Args:
        encoding: any but ``none``.
        begins: (runs,), each run's first token among those that ``decode_scatter`` is given slots of.
        starts: (runs,), where in its chunk a run starts.
        lengths: (runs,), tokens of each run, at least one.
        chunk_tokens: (runs,), of the whole chunk.
        places: (runs, PIECES, 2), of each tensor of the chunk, in the order of ``kept_as``: its first byte in what
            ``decode_scatter`` is given, at the layer ``placed_at``, and bytes to the next layer; the rest is not used.
    """
    skipped = WHOLE_TOKENS if encoding == "int4" else 0
    stops = starts + lengths
    low, high = np.maximum(starts - skipped, 0), np.maximum(stops - skipped, 0)
    first = np.where(starts < skipped, -1, low // GROUP)
    last = np.where(high > low, -(-high // GROUP), np.minimum(first + 1, 0))
    counts = last - first
    of = np.repeat(np.arange(len(counts)), counts)
    groups = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts - first, counts)
    # Of a chunk's token, the tile's row 0: the group's first token, or that of the whole tokens.
    zero = np.where(groups < 0, 0, skipped + GROUP * groups)
    end = np.where(groups < 0, skipped, zero + GROUP)
    tiles = np.empty((len(of), _FIELDS.value), dtype=np.int64)
    tiles[:, 0] = begins[of] - starts[of] + zero
    tiles[:, 1] = np.maximum(starts[of], zero) - zero
    tiles[:, 2] = np.minimum(stops[of], end) - zero
    tiles[:, 3] = groups
    tiles[:, 4] = chunk_tokens[of]
    tiles[:, _AHEAD.value :] = places.reshape(len(counts), 2 * PIECES)[of]
    return tiles, counts


def decode_scatter(
    staged: torch.Tensor,
    tiles: torch.Tensor,
    slots: torch.Tensor,
    turn: tuple[torch.Tensor, torch.Tensor] | None,
    interleaved: bool,
    caches: PagedCaches,
    layers: range,
    placed_at: int,
    encoding: Encoding,
) -> None:
    """Write encoded tokens into the paged caches of some neighbouring layers.

    Args:
        staged: uint8; each tensor of a chunk lies in it as ``EncodedKV`` has it, or a layer of it does.
        tiles: from ``tiles_of``, on the device.
        slots: (tokens,) int64; a token at −1 is passed over.
        turn: cosines and sines from ``blend.rope.shift``, each (tokens, rotary_dim / 2) float32; None: as stored.
        interleaved: pairs are neighbours (GPT-J) rather than halves (NeoX).
        caches: of all layers.
        layers: which of them are written.
        placed_at: the layer whose places the tiles hold, at most the first that is written.
        encoding: of all these tokens, not ``none``.
    """
    if not len(tiles) or not layers:
        return
    half = 0 if turn is None else turn[0].shape[1]
    padded = triton.next_power_of_2(caches.dim)
    cos, sin = turn if turn is not None else (staged, staged)
    _kernel[(len(tiles), caches.heads, len(layers))](
        staged,
        tiles,
        slots,
        cos,
        sin,
        caches.addresses,
        layers.start,
        layers.start - placed_at,
        *caches.strides,
        caches.block_size,
        ENCODING=encoding,
        DTYPE=getattr(tl, str(caches.dtype).removeprefix("torch.")),
        HEADS=caches.heads,
        DIM=caches.dim,
        HALF=half,
        INTERLEAVED=interleaved,
        DIM_PADDED=padded,
        num_warps=min(max(padded // 16, 4), 16),  # a thread then holds its share of a tile in registers
    )


__all__ = ["PIECES", "decode_scatter", "tiles_of"]
