"""Companions: for each chunk the most similar other one, behind which it is computed (``ingest_context: similar``).

Retrieval brings similar chunks into one prompt, so a chunk's likeliest neighbours are those most like it
(FusionRAG computes chunks behind theirs). How alike two chunks are is the cosine of their TF-IDF vectors over
token ids, hashed to a fixed length (count sketch: Charikar, Chen and Farach-Colton 2002), which needs no index.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvblend_rag.blend.chunk import TokenIds

MOST = 20_000
"""Chunks of one ingest that are compared with one another: 80 MB of vectors, and seconds on a CPU."""

STORED = 2000
"""Stored chunks that they are compared with as well, the newest: a tenth of a second."""

_LENGTH = 1024
_ROWS = 1024
_LEAST = 0.15
"""Below it is what hashing makes of chunks that have nothing in common."""
_SAME = 0.95
"""Above it are copies and other versions of the same text: which of them a prompt gets nobody knows."""


def companions(among: Sequence[TokenIds], count: int) -> list[int | None]:
    """For each of the first ``count`` chunks: the place of its companion; None where nothing is like it.

    Args:
        among: token ids of chunks, each int32 of shape (tokens,).
        count: how many of them want one.
    """
    if not count:
        return []
    vectors, found = _vectors(among), list[int | None]()
    for start in range(0, count, _ROWS):
        alike = vectors[start : min(start + _ROWS, count)] @ vectors.T
        alike[alike > _SAME] = -1.0
        best = alike.argmax(axis=1)
        found += [int(at) if row[at] >= _LEAST else None for row, at in zip(alike, best, strict=True)]
    return found


def _vectors(chunks: Sequence[TokenIds]) -> npt.NDArray[np.float32]:
    """Unit vectors, float32 of shape (chunks, _LENGTH)."""
    owners = np.repeat(np.arange(len(chunks), dtype=np.int64), [len(each) for each in chunks])
    pairs, counts = np.unique((owners << 32) | np.concatenate(chunks).astype(np.int64), return_counts=True)
    rows, tokens = pairs >> 32, pairs & 0xFFFFFFFF
    _, places, holders = np.unique(tokens, return_inverse=True, return_counts=True)
    weights = (1.0 + np.log(counts)) * np.log1p(len(chunks) / holders[places])
    mixed = _mixed(tokens.astype(np.uint64))
    columns, signs = mixed % np.uint64(_LENGTH), np.where(mixed >> np.uint64(63), 1.0, -1.0)
    vectors = np.zeros((len(chunks), _LENGTH), dtype=np.float32)
    np.add.at(vectors, (rows, columns), weights * signs)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    return vectors


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's last steps (Steele, Lea and Flood 2014): neighbouring numbers become unrelated ones."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values ^ (values >> np.uint64(31))


__all__ = ["MOST", "STORED", "companions"]
