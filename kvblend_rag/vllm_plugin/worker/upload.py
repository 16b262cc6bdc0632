"""Upload: small tables from the host to the device, past gigabytes of chunks on their way.

A copy that goes through a GPU's copy engine waits for those in front of it, of whichever stream; behind a
32k prompt's chunks that is 70 ms on an H100. A kernel that reads page-locked memory waits for nobody.
"""

from __future__ import annotations

import math

import torch

_SEGMENT_BYTES = 8 << 20
_SEGMENTS = 3
_ALIGNMENT = 64


class Upload:
    """Callable: a host tensor as a tensor on the device, without waiting for the work ahead.

    Args:
        device: where to; on a CPU tensors are returned as they are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor

            self._host = torch.empty(_SEGMENTS, _SEGMENT_BYTES, dtype=torch.uint8, pin_memory=True)
            self._seen = get_accelerator_view_from_cpu_tensor(self._host)
            self._read: list[torch.cuda.Event | None] = [None] * _SEGMENTS
            self._segment = self._used = 0

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device, contiguous; to be used on the current stream."""
        if self._device.type != "cuda":
            return tensor.to(self._device)
        nbytes = tensor.nbytes
        room = math.ceil(nbytes / _ALIGNMENT) * _ALIGNMENT
        if room > _SEGMENT_BYTES:
            return tensor.pin_memory().to(self._device, non_blocking=True)
        if self._used + room > _SEGMENT_BYTES:
            self._turn_over()
        part = slice(self._used, self._used + room)
        self._used += room
        self._host[self._segment, part][:nbytes].view(tensor.dtype).copy_(tensor.flatten())
        # An operation, since a plain copy would go through the copy engine after all.
        words = self._seen[self._segment, part].view(torch.int32).bitwise_or(0)
        return words.view(torch.uint8)[:nbytes].view(tensor.dtype).view(tensor.shape)

    def _turn_over(self) -> None:
        """Go to the next segment, once the kernels that read it have run."""
        read = torch.cuda.Event()
        read.record()
        self._read[self._segment] = read
        self._segment, self._used = (self._segment + 1) % _SEGMENTS, 0
        last = self._read[self._segment]
        if last is not None:
            last.synchronize()


__all__ = ["Upload"]
