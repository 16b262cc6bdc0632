"""EncodedKV: a chunk's KV as an encoding keeps it, for a device that decodes while it loads."""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import torch

from kvblend_rag.store.encoding import Encoding, Shape, Tensors, decode, encode, kept_as

_ALIGNMENT = 64
"""Bytes, at whose multiples layers and tensors begin, so that any dtype may be read there."""

_LAYERS_AT_ONCE = 4
"""Encoded together: on the way values are float32, for which a GPU that serves has little room."""


class _Place(NamedTuple):
    """Where a layer of a tensor lies in a layer of the buffer."""

    start: int
    """In bytes."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Of a layer."""

    @property
    def stop(self) -> int:
        """In bytes."""
        return self.start + math.prod(self.shape) * self.dtype.itemsize


class EncodedKV:
    """A chunk's KV in the tensors of an encoding, all in one buffer, on the host or a device.

    The buffer holds a layer after the other, so that a layer is one copy: in each, the encoding's tensors in the order
    of ``kept_as``.

    Args:
        encoding: any but ``none``.
        dtype: of the cache that it is decoded for.
        shape: as decoded, (layers, 2, tokens, kv_heads, head_dim).
        buffer: uint8, shape (layers * layer_nbytes,), contiguous; not written to afterwards.

    Raises:
        ValueError: no chunk has that shape, or its buffer is of other size.

    Attributes:
        layer_nbytes: bytes of a layer.
    """

    def __init__(self, encoding: Encoding, dtype: torch.dtype, shape: Shape, buffer: torch.Tensor) -> None:
        self.encoding, self.dtype, self.shape, self.buffer = encoding, dtype, shape, buffer
        self._places, self.layer_nbytes = _laid_out(encoding, dtype, shape)
        if buffer.shape != (shape[0] * self.layer_nbytes,):
            raise ValueError(f"{tuple(buffer.shape)} bytes for KV of shape {shape} in {encoding}")

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return self.buffer.nbytes

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.buffer.device

    @property
    def is_cuda(self) -> bool:
        """Whether that is a GPU."""
        return self.buffer.is_cuda

    def is_pinned(self) -> bool:
        """Whether it lies in page-locked memory."""
        return self.buffer.is_pinned()

    def pin_memory(self) -> EncodedKV:
        """The same in page-locked memory; not copied if it is there."""
        return self.moved(self.buffer.pin_memory())

    def moved(self, buffer: torch.Tensor) -> EncodedKV:
        """The same in another buffer, that holds the same bytes or will."""
        return EncodedKV(self.encoding, self.dtype, self.shape, buffer)

    @property
    def starts(self) -> list[int]:
        """Of each tensor, in the order of ``kept_as``: its first byte in a layer."""
        return [place.start for place in self._places.values()]

    @property
    def tensors(self) -> Tensors:
        """Views of the encoding's tensors, by name."""
        count = self.shape[0]
        layers = self.buffer.view(count, self.layer_nbytes)
        return {
            name: layers[:, place.start : place.stop].view(place.dtype).view(count, *place.shape)
            for name, place in self._places.items()
        }

    def decode(self) -> torch.Tensor:
        """The KV, where it lies, shape ``shape``."""
        return decode(self.tensors, self.encoding, self.dtype)

    def decode_layer(self, index: int, device: torch.device) -> torch.Tensor:
        """One layer's KV, brought to a device first, (2, tokens, kv_heads, head_dim)."""
        part = self.buffer[index * self.layer_nbytes : (index + 1) * self.layer_nbytes]
        layer = part.to(device, non_blocking=True)
        return EncodedKV(self.encoding, self.dtype, (1, *self.shape[1:]), layer).decode()[0]


KV: TypeAlias = torch.Tensor | EncodedKV
"""A chunk's, (layers, 2, tokens, kv_heads, head_dim), decoded or not."""


def buffer_of(kv: KV) -> torch.Tensor:
    """The one tensor that holds all of it."""
    return kv.buffer if isinstance(kv, EncodedKV) else kv


def in_buffer(kv: KV, buffer: torch.Tensor) -> KV:
    """The same KV in another ``buffer_of`` it, that holds the same bytes or will."""
    return kv.moved(buffer) if isinstance(kv, EncodedKV) else buffer


def encoded(kv: torch.Tensor, encoding: Encoding) -> KV:
    """KV as an encoding keeps it, on the same device; itself where that is as computed."""
    if encoding == "none":
        return kv
    layers, two, tokens, heads, dim = kv.shape
    shape = (layers, two, tokens, heads, dim)
    _, layer_nbytes = _laid_out(encoding, kv.dtype, shape)
    # Zeros, so that what fills up is the same in any file of the chunk.
    buffer = torch.zeros(layers * layer_nbytes, dtype=torch.uint8, device=kv.device)
    made = EncodedKV(encoding, kv.dtype, shape, buffer)
    views = made.tensors
    for start in range(0, layers, _LAYERS_AT_ONCE):
        part = slice(start, start + _LAYERS_AT_ONCE)
        for name, tensor in encode(kv[part], encoding).items():
            views[name][part].copy_(tensor)
    return made


def _laid_out(encoding: Encoding, dtype: torch.dtype, shape: Shape) -> tuple[dict[str, _Place], int]:
    """Where each tensor lies in a layer, and the bytes of a layer."""
    if len(shape) != 5 or shape[1] != 2 or min(shape) < 1:
        raise ValueError(f"KV of shape {shape}")
    places, end = {}, 0
    for name, (kept, (_, *layer)) in kept_as(shape, encoding, dtype).items():
        places[name] = _Place(end, kept, tuple(layer))
        end = -(-places[name].stop // _ALIGNMENT) * _ALIGNMENT
    return places, end


__all__ = ["KV", "EncodedKV", "buffer_of", "encoded", "in_buffer"]
