"""PagedCaches: the caches of several layers, as a kernel finds them in one launch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

_ALIGNMENT = 16


class PagedCaches:
    """The paged caches of layers that are alike in shape, strides and dtype.

    Args:
        caches: by layer, each (blocks, kv_heads, block_size, 2 * head_dim), any strides but the last, keys in the
            first half.

    Raises:
        ValueError: they are not alike.
    """

    def __init__(self, caches: Sequence[torch.Tensor]) -> None:
        self._caches = list(caches)  # what the addresses point to must not go
        like = self._caches[0]
        self.heads, self.block_size, self.dim = like.shape[1], like.shape[2], like.shape[3] // 2
        self.strides, self.dtype = like.stride()[:3], like.dtype
        if any(cache.stride() != like.stride() or cache.dtype != like.dtype for cache in self._caches):
            raise ValueError("the layers' caches are not alike")
        if any(cache.data_ptr() % _ALIGNMENT for cache in self._caches):
            raise ValueError(f"a layer's cache does not begin at a multiple of {_ALIGNMENT} bytes")
        self.addresses = self.addresses_of(range(len(self._caches))).to(like.device)
        """(layers,) int64, on the caches' device."""

    def addresses_of(self, layers: Iterable[int]) -> torch.Tensor:
        """(layers,) int64, on the host: where each of these layers' caches begins, a multiple of 16 bytes."""
        return torch.tensor([self._caches[index].data_ptr() for index in layers])


def launches(kinds: Sequence[object], most: int, first: int | None = None) -> list[range]:
    """Which layers go in one launch: neighbours of one kind, since a launch knows one rotation, or one scale.

    Args:
        kinds: of the layers, in their order.
        most: layers in a launch.
        first: layers in the first launch at most; None: ``most``.
    """
    found: list[range] = []
    start = 0
    while start < len(kinds):
        end = min(len(kinds), start + (most if start or first is None else first))
        stop = next((index for index in range(start, end) if kinds[index] != kinds[start]), end)
        found.append(range(start, stop))
        start = stop
    return found


__all__ = ["PagedCaches", "launches"]
