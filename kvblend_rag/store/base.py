"""ChunkStore: tensors by key. What a tier must do, and no more."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from kvblend_rag.blend.chunk import TokenIds
from kvblend_rag.store.encoded import KV, EncodedKV


@dataclass(frozen=True, eq=False)
class StoredChunk:
    """A chunk as a tier keeps it: its KV, and what is needed to list it in a catalogue again."""

    key: str
    namespace: str
    token_ids: TokenIds
    """int32, shape (tokens,)."""
    kv: KV
    """Shape (layers, 2, tokens, kv_heads, head_dim), on the host; encoded where a GPU will decode it."""

    def decoded(self) -> torch.Tensor:
        """The KV, decoded."""
        return self.kv.decode() if isinstance(self.kv, EncodedKV) else self.kv


class ChunkStore(ABC):
    """KV of chunks by key. Every method may be called from several threads.

    A chunk's KV is one tensor of shape ``(layers, 2, tokens, kv_heads, head_dim)``: keys then values,
    keys as they stand in vLLM's cache (rotated to the positions at which they were computed), in the
    dtype of the cache or encoded for it, on the host. With tensor parallelism it holds the rank's own heads.
    """

    name: str
    """The tier's name in reports: ``memory``, ``disk``, …"""

    remote = False
    """Whether reading waits for a server rather than for this machine."""

    @abstractmethod
    def put(self, chunk: StoredChunk) -> None:
        """Keep a chunk; when this returns, the tier has done all it promises (the disk: fsync).

        The tensor may be kept without a copy: the caller must not write to it afterwards.

        Raises:
            StoreFull: no space is left.
            StoreError: the tier can't be written.
        """

    @abstractmethod
    def read(self, key: str) -> StoredChunk:
        """A chunk, whole; the caller must not write to its tensor.

        Raises:
            ChunkMissing: the tier doesn't hold it.
            ChunkDamaged: it fails its checksum; the tier has put it out of the way.
            StoreError: the tier can't be read.
        """

    def get(self, key: str) -> torch.Tensor:
        """A chunk's KV alone, decoded; raises what ``read`` raises."""
        return self.read(key).decoded()

    @abstractmethod
    def contains(self, key: str) -> bool:
        """Whether the tier holds the chunk, without reading it."""

    def as_stored(self, chunk: StoredChunk) -> StoredChunk:
        """The chunk as ``read`` will give it, should the tier keep less than was computed."""
        return chunk

    def keeps(self, key: str) -> bool:
        """Whether the tier holds the chunk, once every removal that is under way is done."""
        return self.contains(key)

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Forget chunks; unknown keys are passed over."""

    def delete_unheld(self, keys: Iterable[str]) -> list[str]:
        """Forget those of the chunks that no document holds, and return their keys.

        A tier without a catalogue knows of no documents, so it forgets all of them.
        """
        keys = list(keys)
        self.delete(keys)
        return keys

    def touch(self, key: str) -> None:  # noqa: B027, most tiers notice their own use
        """Count a use that a faster tier served, so that what is hot there doesn't grow old here."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes the tier holds now."""

    def close(self) -> None:  # noqa: B027, most tiers hold nothing open
        """Let go of what the tier holds open; a second call does nothing."""


__all__ = ["ChunkStore", "StoredChunk"]
