"""Copies from page-locked memory to the device: of some layers of many chunks at once, on the current stream.

Large pieces go in one driver call (``ops.swap_blocks_batch``, cuMemcpyBatchAsync), which costs the host least. Of many
pieces of 256 to 30,000 bytes such a call ends the CUDA context ("unspecified launch failure", soon or after some
hundred calls; driver 580.159.04; ``tests/gpu/batched_copies.py``; vLLM's issue 49276). So small pieces go by the
runtime's own copies, all layers of a piece in one: they lie behind one another in the chunk.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from vllm import _custom_ops as ops
from vllm.utils.system_utils import find_loaded_library

from kvblend_rag.errors import ConfigError

_LARGE = 1 << 16
"""Bytes from which pieces go in batches; twice what was seen to do no harm."""

_TO_DEVICE = 1
"""cudaMemcpyHostToDevice"""


@dataclass(frozen=True)
class Piece:
    """What is copied of a chunk, as much of each layer."""

    source: int
    """Host address of the first layer's bytes; the next layer's follow at once."""
    step: int
    """Bytes of a layer."""
    offset: int
    """Where they go, in bytes from where the layer begins on the device."""


class Batch:
    """Pieces that are copied together.

    Args:
        pieces: of at least a byte each.
        nbytes: from where a layer begins on the device to where the next does.
    """

    def __init__(self, pieces: list[Piece], nbytes: int) -> None:
        self.nbytes = nbytes
        self._small = [piece for piece in pieces if piece.step < _LARGE]
        large = [(piece.source, piece.step, piece.offset) for piece in pieces if piece.step >= _LARGE]
        self._sources, self._steps, self._offsets = torch.tensor(large, dtype=torch.int64).reshape(-1, 3).T.contiguous()

    def copy(self, layers: range, target: int) -> None:
        """Send some layers off.

        Args:
            layers: neighbours.
            target: device address where the first of them begins.

        Raises:
            RuntimeError: the driver refuses.
        """
        count = len(layers)
        if len(self._steps):
            index = torch.arange(count)[:, None]
            ops.swap_blocks_batch(
                (self._sources + (layers.start + index) * self._steps).flatten(),
                (self._offsets + index * self.nbytes + target).flatten(),
                self._steps.repeat(count),
                is_src_access_order_any=True,
            )
        if self._small:
            copy_rows, stream = cuda_runtime().cudaMemcpy2DAsync, torch.cuda.current_stream().cuda_stream
            for piece in self._small:
                at, source, step = target + piece.offset, piece.source + layers.start * piece.step, piece.step
                error = copy_rows(at, self.nbytes, source, step, step, count, _TO_DEVICE, stream)
                if error:
                    raise RuntimeError(f"a copy of {count} × {step} bytes to the GPU ended with CUDA's error {error}")


@functools.cache
def cuda_runtime() -> ctypes.CDLL:
    """The CUDA runtime that PyTorch runs on.

    Raises:
        ConfigError: there is none that can be called.
    """
    found = find_loaded_library("libcudart")
    if found is None:
        raise ConfigError("PyTorch holds the CUDA runtime in itself, and copies need libcudart: install its own wheels")
    library = ctypes.CDLL(found)
    address, size = ctypes.c_void_p, ctypes.c_size_t
    library.cudaMemcpy2DAsync.argtypes = [address, size, address, size, size, size, ctypes.c_int, address]
    return library


__all__ = ["Batch", "Piece", "cuda_runtime"]
