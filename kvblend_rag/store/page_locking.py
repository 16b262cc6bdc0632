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


def give_back(most: int) -> None:
    """Have PyTorch keep no more free page-locked memory than this, in bytes.

    What was freed in one size serves no other: without this, memory that is bounded would grow with each size in turn.
    """
    counts = torch.cuda.host_memory_stats()
    if counts and counts["allocated_bytes.current"] - counts["active_bytes.current"] > most:
        torch._C._host_emptyCache()


__all__ = ["allocator_settings", "give_back", "lock_pages_by_threads", "locked_bytes"]
