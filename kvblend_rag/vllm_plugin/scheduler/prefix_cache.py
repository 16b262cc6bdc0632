"""Keep blended KV out of the exact prefix cache.

A block's hash is H(parent's hash, tokens, …) (vllm/v1/core/kv_cache_utils.py). From the first block that
is not computed exactly, a blended request's hashes get the blend's digest mixed in; the chain carries
it into every block behind, those of the answer included. Blocks in front keep their plain hashes, so
the system prompt stays shared, and the prefix cache stays on for everyone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from vllm.v1.request import Request, RequestStatus


def isolate(request: Request, block: int, digest: str) -> None:
    """Make the request's hashes private from block ``block`` on."""
    plain = request._block_hasher
    if plain is None:  # prefix caching is off
        return
    # Each plain hash stands for all tokens up to its block's end, so mixing the digest in is enough; hashing the
    # prompt's chain again would cost as much as vLLM's own hashing of it.
    request.block_hashes[block:] = [_mixed(each, digest) for each in request.block_hashes[block:]]
    request._block_hasher = _PrivateHasher(plain, block, digest)


class _PrivateHasher:
    """vLLM's block hasher for the blocks that are filled later, the first of which may be the first private one."""

    def __init__(self, plain: Any, block: int, digest: str) -> None:
        self._plain, self._block, self._digest = plain, block, digest

    def __call__(self, request: Request) -> list[Any]:
        start = len(request.block_hashes)
        fresh: list[Any] = self._plain(request)
        # Behind a private hash the chain is private by itself.
        return (
            fresh
            if start > self._block
            else [_mixed(h, self._digest) if start + i >= self._block else h for i, h in enumerate(fresh)]
        )


def _mixed(block_hash: bytes, digest: str) -> Any:
    return hashlib.sha256(block_hash + digest.encode()).digest()


def still_computing(request: Request, hit_blocks: int, block_size: int, others: Iterable[Request]) -> bool:
    """Whether a block that the request hits in the prefix cache is only computed in this very step.

    vLLM lists a block as cached when it is scheduled. Its own forward serves both requests at once, but
    a blend runs before that forward, and would read the block before it is written.
    """
    last = hit_blocks - 1
    if last < 0:
        return False
    return any(
        other is not request
        and other.status == RequestStatus.RUNNING
        and len(other.block_hashes) > last
        and other.block_hashes[last] == request.block_hashes[last]
        and other.num_computed_tokens < hit_blocks * block_size
        for other in others
    )


__all__ = ["isolate", "still_computing"]
