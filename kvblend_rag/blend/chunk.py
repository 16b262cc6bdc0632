"""What a chunk is called: digests over everything its KV depends on.

A chunk's KV is determined by the model that computed it, by what stood in front of it, and by its
tokens. The first two make a *namespace*; namespace and tokens make the chunk's key. A stale or
foreign chunk therefore has another key and can never be loaded by mistake. Behind the ingest context ``similar``
the last of what stood in front is a chunk's own: which one that was is not part of the key, since any of them is as
good a guess at what will stand there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

TokenIds: TypeAlias = npt.NDArray[np.int32]

_DIGEST_BYTES = 16
_RANKS = "/tp"


def as_token_ids(tokens: Sequence[int] | npt.NDArray[np.integer]) -> TokenIds:
    """Token ids as a contiguous int32 array of shape (tokens,)."""
    return np.ascontiguousarray(tokens, dtype=np.int32)


def of_ranks(model_fingerprint: str, ranks: int) -> str:
    """The fingerprint of an engine whose ranks share a model's heads: their parts of a chunk fit no other number."""
    return model_fingerprint if ranks == 1 else f"{model_fingerprint}{_RANKS}{ranks}"


def model_of(fingerprint: str) -> str:
    """The model's own part of an engine's fingerprint, the same for any number of ranks."""
    return fingerprint.partition(_RANKS)[0]


def namespace(model_fingerprint: str, context: Sequence[int] | TokenIds, tenant: str = "") -> str:
    """The name shared by all chunks whose KV may stand in one another's place.

    Args:
        model_fingerprint: digest of weights, dtype, rotary parameters and tokenizer, and the ranks, from the engine.
        context: token ids of the ingest context.
        tenant: whose chunks these are.
    """
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in (model_fingerprint.encode(), as_token_ids(context).tobytes(), tenant.encode()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def chunk_key(space: str, tokens: TokenIds) -> str:
    """The key of a chunk: 32 hexadecimal digits over its namespace and its token ids."""
    digest = hashlib.blake2b(space.encode(), digest_size=_DIGEST_BYTES)
    digest.update(as_token_ids(tokens).tobytes())
    return digest.hexdigest()


__all__ = ["TokenIds", "as_token_ids", "chunk_key", "model_of", "namespace", "of_ranks"]
