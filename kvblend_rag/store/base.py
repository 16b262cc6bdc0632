"""ChunkStore: tensors by key. What a tier must do, and no more."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch


class ChunkStore(ABC):
    """KV of chunks by key. Every method may be called from several threads.

    A chunk's KV is one tensor of shape ``(layers, 2, kv_heads, tokens, head_dim)``: keys then values,
    keys as they stand in vLLM's cache (rotated to the positions at which they were computed), in the
    dtype of the cache, on the host. With tensor parallelism it holds the rank's own heads.
    """

    name: str
    """The tier's name in reports: ``memory``, ``disk``, …"""

    @abstractmethod
    def put(self, key: str, kv: torch.Tensor) -> None:
        """Keep a chunk; when this returns, the tier has done all it promises (the disk: fsync).

        Raises:
            StoreFull: no space is left.
            StoreError: the tier can't be written.
        """

    @abstractmethod
    def get(self, key: str) -> torch.Tensor:
        """A chunk's KV; the caller must not write to it.

        Raises:
            ChunkMissing: the tier doesn't hold it.
            ChunkDamaged: it fails its checksum; the tier has put it out of the way.
            StoreError: the tier can't be read.
        """

    @abstractmethod
    def contains(self, key: str) -> bool:
        """Whether the tier holds the chunk, without reading it."""

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Forget chunks; unknown keys are passed over."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes the tier holds now."""

    def close(self) -> None:
        """Let go of what the tier holds open; a second call does nothing."""
