"""Page-locking: how PyTorch gets the host memory that a GPU copies from without waiting, and how much of it.

It keeps what is freed for the next that needs as much, in blocks of powers of two
(aten/src/ATen/core/CachingHostAllocator.h), so a chunk of 130 MiB takes 256.

Its own way to get it is the driver's ``cudaHostAlloc``, which serves one thread at a time and touches each page itself:
2 GB/s on an H100's host, which an ingest of 5 GB/s waits for. Pages that several threads touch first and the driver
then registers come at 15 GB/s there.
"""

from __future__ import annotations

import logging
import os

import torch

logger = logging.getLogger(__name__)

_OURS = "pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def allocator_settings() -> str:
    """For PyTorch's allocators: ours, and behind them, so that they win, the user's.

    The user's are said again, since each call sets back some of those that it does not name.
    """
    return ",".join(filter(None, [_OURS, *(os.environ.get(name) for name in reversed(_VARIABLES))]))


def lock_pages_by_threads() -> None:
    """Have this process get page-locked memory so, from now on; with CUDA alone.

    Where PyTorch does not take it, ingest is slower and nothing else is.
    """
    setter = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # since PyTorch 2.10
    try:
        (setter or torch.cuda.memory._set_allocator_settings)(allocator_settings())
    except (RuntimeError, ValueError) as error:
        logger.warning("kvblend: page-locked memory comes in PyTorch's own, slower way: %s", error)


def locked_bytes(nbytes: int) -> int:
    """What so many bytes take, page-locked."""
    return 1 << (nbytes - 1).bit_length() if nbytes else 0


class Spare:
    """Free page-locked memory that PyTorch keeps: given back beyond a bound.

    What was freed in one size serves no other: without this, memory that is bounded would grow with each size in turn.

    Args:
        most: bytes that may lie free.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._others: int | None = None
        """The least that was ever taken beside us: what is not ours and not free. PyTorch's own count of what is in
        use was seen to grow without end (2.11)."""

    def bound(self, ours: int) -> None:
        """Give back what is free, if that may be too much.

        Args:
            ours: bytes that the caller's tensors take.
        """
        beside = self._taken() - ours
        if self._others is None or beside < self._others:
            self._others = beside
        elif beside > self._others + self._most:
            torch._C._host_emptyCache()
            self._others = self._taken() - ours

    @staticmethod
    def _taken() -> int:
        """Bytes that PyTorch has page-locked, in use or free."""
        return int(torch.cuda.host_memory_stats()["allocated_bytes.current"])


__all__ = ["Spare", "allocator_settings", "lock_pages_by_threads", "locked_bytes"]
