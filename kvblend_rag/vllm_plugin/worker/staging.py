"""Staging: which parts of a request's chunks are copied together, and where kernels find each token then."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvblend_rag.blend.plan import BlendPlan
from kvblend_rag.kernels.decode_scatter import PIECES, tiles_of
from kvblend_rag.store.encoded import KV, EncodedKV, buffer_of
from kvblend_rag.store.encoding import ENCODINGS, Encoding
from kvblend_rag.vllm_plugin.worker.host_copies import Batch, Piece
from kvblend_rag.vllm_plugin.worker.loader import Chunks

_ALIGNMENT = 16
"""Bytes, so that a piece begins where any dtype may be read."""


@dataclass(frozen=True)
class Group:
    """Reused tokens that come through one kernel: all of one encoding, and all staged or all on the device."""

    encoding: Encoding
    base: torch.Tensor | None
    """One of the chunks on the device, from whose first byte places are counted; None: from where a layer begins in a
    staging slot."""
    table: torch.Tensor
    """As computed: (3, reused tokens) int64, a token's keys, its values, and how far it is to those of the next layer,
    in elements. Encoded: tiles (``decode_scatter``)."""
    tokens: torch.Tensor | None
    """(reused tokens,) bool: those of which the table tells, on the host; None: of none but its own."""
    parts: list[slice]
    """Of the tokens, or of the tiles: those of each batch. On the device: one, of all."""


@dataclass(frozen=True)
class Layout:
    """A request's chunks on their way."""

    batches: list[Batch]
    """Chunks that are staged together, the same for every layer."""
    groups: list[Group]
    largest: int
    """Bytes of the largest batch's layer, which a staging slot must hold."""


def lay_out(plan: BlendPlan, chunks: Chunks, room: int, row_bytes: int, itemsize: int) -> Layout:
    """What is copied together, and what kernels are told.

    Args:
        plan: which chunk tokens stand where.
        chunks: on the device, or in page-locked memory.
        room: bytes of a staging slot, which only a single chunk's layer may exceed.
        row_bytes: of a token's keys at one layer, as computed.
        itemsize: of the cache's dtype.
    """
    bases = {_encoding(kv): buffer_of(kv) for kv in chunks.values() if kv.is_cuda}
    batches, of_batch, places, largest = _batches(plan, chunks, room, bases)
    runs = plan.runs
    kvs = [chunks[run.key] for run in runs]
    lengths, starts = np.array([(run.length, run.chunk_start) for run in runs], dtype=np.int64).T
    begins, sizes = lengths.cumsum() - lengths, np.array([kv.shape[2] for kv in kvs], dtype=np.int64)
    kinds = [(ENCODINGS.index(_encoding(kv)), kv.is_cuda) for kv in kvs]
    plain: torch.Tensor | None = None
    groups: list[Group] = []
    for kind in sorted(set(kinds)):
        own = np.array([each == kind for each in kinds])
        which = np.flatnonzero(own)
        encoding, tokens = ENCODINGS[kind[0]], None
        base = bases[encoding] if kind[1] else None
        if encoding == "none":
            if plain is None:
                plain = _table(begins, starts, lengths, sizes, places[:, 0] // itemsize, row_bytes // itemsize)
            table, stops, counts = plain, (begins + lengths)[which], lengths[which]
            tokens = None if own.all() else torch.from_numpy(np.repeat(own, lengths))
        else:
            tiles, counts = tiles_of(
                encoding, begins[which], starts[which], lengths[which], sizes[which], places[which]
            )
            table, stops = torch.from_numpy(tiles), counts.cumsum()
        edges = [0, len(which)]
        if base is None:
            edges = np.searchsorted(of_batch[which], range(len(batches) + 1)).tolist()
        # From the first run of the batch that is the group's to the last.
        parts = [
            slice(int(stops[a] - counts[a]), int(stops[b - 1])) if a < b else slice(0)
            for a, b in itertools.pairwise(edges)
        ]
        groups.append(Group(encoding, base, table, tokens, parts))
    return Layout(batches, groups, largest)


def _batches(
    plan: BlendPlan, chunks: Chunks, room: int, bases: Mapping[Encoding, torch.Tensor]
) -> tuple[list[Batch], npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
    """The batches, (runs,) which is each run's, (runs, PIECES, 2) as ``tiles_of`` takes them, and ``Layout.largest``.

    What lies on the device is counted from the base of its encoding.
    """
    near = np.array([chunks[run.key].is_cuda for run in plan.runs])
    of_batch = np.zeros(len(near), dtype=np.int64)
    places = np.zeros((len(near), PIECES, 2), dtype=np.int64)
    batches: list[Batch] = []
    staged: dict[str, int] = {}
    used = largest = first = 0

    def close(stop: int) -> None:
        copied = [Piece(buffer_of(chunks[key]).data_ptr(), _step(chunks[key]), at) for key, at in staged.items()]
        of_batch[first:stop] = len(batches)
        batches.append(Batch(copied, used))
        places[first:stop, :, 1][~near[first:stop]] = used

    for index, run in enumerate(plan.runs):
        kv = chunks[run.key]
        step, starts = _step(kv), kv.starts if isinstance(kv, EncodedKV) else [0]
        if near[index]:
            at = buffer_of(kv).data_ptr() - bases[_encoding(kv)].data_ptr()
            places[index, :, 1] = step
        elif run.key in staged:
            at = staged[run.key]
        else:
            size = -(-step // _ALIGNMENT) * _ALIGNMENT
            if staged and used + size > room:
                close(index)
                staged, used, first = {}, 0, index
            at = staged[run.key] = used
            used += size
            largest = max(largest, used)
        places[index, : len(starts), 0] = [at + start for start in starts]
    if staged:
        close(len(near))
    return batches, of_batch, places, largest


def _table(
    begins: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    places: npt.NDArray[np.int64],
    row: int,
) -> torch.Tensor:
    """``Group.table`` of chunks as computed; ``places`` (runs, 2) and ``row`` in elements."""
    keys_at = np.repeat(places[:, 0] + row * (starts - begins), lengths) + row * np.arange(lengths.sum())
    to_values, steps = np.repeat(row * sizes, lengths), np.repeat(places[:, 1], lengths)
    return torch.from_numpy(np.stack([keys_at, keys_at + to_values, steps]))


def _encoding(kv: KV) -> Encoding:
    return kv.encoding if isinstance(kv, EncodedKV) else "none"


def _step(kv: KV) -> int:
    """Bytes from one layer to the next."""
    return buffer_of(kv).nbytes // kv.shape[0]


__all__ = ["Group", "Layout", "lay_out"]
