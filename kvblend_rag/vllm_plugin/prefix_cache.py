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
    """Make the request's hashes private from block ``block`` on; a second call with the same is harmless."""
    plain = getattr(request._block_hasher, "plain", request._block_hasher)
    if plain is None:  # prefix caching is off
        return
    request._block_hasher = _PrivateHasher(plain, block, digest)
    del request.block_hashes[block:]
    request.update_block_hashes()


class _PrivateHasher:
    """vLLM's block hasher, with a digest mixed into one block of the chain."""

    def __init__(self, plain: Any, block: int, digest: str) -> None:
        self.plain, self._block, self._digest = plain, block, digest.encode()

    def __call__(self, request: Request) -> list[Any]:
        start = len(request.block_hashes)
        fresh: list[Any] = self.plain(request)
        if not start <= self._block < start + len(fresh):
            return fresh
        at = self._block - start
        head = [*fresh[:at], hashlib.sha256(fresh[at] + self._digest).digest()]
        # What follows must chain from the private hash, and the plain hasher chains from the request's last.
        request.block_hashes.extend(head)
        rest = self.plain(request)
        del request.block_hashes[start:]
        return head + rest


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
