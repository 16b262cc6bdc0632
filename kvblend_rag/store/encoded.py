"""EncodedKV: a chunk's KV as an encoding keeps it, for a device that decodes while it loads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import torch

from kvblend_rag.store.encoding import Encoding, Shape, Tensors, decode, encode, kept_as

_ALIGNMENT = 64

_LAYERS_AT_ONCE = 4
"""Encoded together: on the way values are float32, for which a GPU that serves has little room."""


class Place(NamedTuple):
    """Where a tensor lies in a buffer."""

    start: int
    """In bytes."""
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class EncodedKV:
    """A chunk's KV in the tensors of an encoding, all in one buffer, on the host or a device.

    Args:
        encoding: any but ``none``.
        dtype: of the cache that it is decoded for.
        buffer: uint8, shape (bytes,), contiguous; not written to afterwards.
        places: of the encoding's tensors in it, by name; others are passed over.

    Raises:
        LookupError, ValueError: the tensors are none of this encoding's.

    Attributes:
        shape: as decoded, (layers, 2, tokens, kv_heads, head_dim).
        pieces: of each tensor, in the order of ``kept_as``: first byte, and bytes from layer to layer.
    """

    def __init__(
        self, encoding: Encoding, dtype: torch.dtype, buffer: torch.Tensor, places: Mapping[str, Place]
    ) -> None:
        self.encoding, self.dtype, self.buffer = encoding, dtype, buffer
        self.shape = _shape(encoding, places)
        kept = kept_as(self.shape, encoding, dtype)
        self._places = {name: places[name] for name in kept}
        for name, place in self._places.items():
            if (place.dtype, place.shape) != kept[name] or place.start % place.dtype.itemsize:
                raise ValueError(f"{name} of {place.dtype} and shape {place.shape} from byte {place.start}")
            if not 0 <= place.start <= place.start + place.nbytes <= buffer.numel():
                raise ValueError(f"{name} from byte {place.start} of {buffer.numel()}")
        layers = self.shape[0]
        self.pieces = [(place.start, place.nbytes // layers) for place in self._places.values()]

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
        return EncodedKV(self.encoding, self.dtype, buffer, self._places)

    @property
    def tensors(self) -> Tensors:
        """Views of the encoding's tensors, by name."""
        return {
            name: self.buffer[place.start : place.start + place.nbytes].view(place.dtype).view(place.shape)
            for name, place in self._places.items()
        }

    def decode(self) -> torch.Tensor:
        """The KV, where it lies, shape ``shape``."""
        return decode(self.tensors, self.encoding, self.dtype)

    def decode_layer(self, index: int, device: torch.device) -> torch.Tensor:
        """One layer's KV, brought to a device first, (2, tokens, kv_heads, head_dim)."""
        tensors = {
            name: tensor[index : index + 1].to(device, non_blocking=True) for name, tensor in self.tensors.items()
        }
        return decode(tensors, self.encoding, self.dtype)[0]


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
    places, end = {}, 0
    for name, (dtype, shape) in kept_as((layers, two, tokens, heads, dim), encoding, kv.dtype).items():
        places[name] = Place(end, dtype, shape)
        end += -(-places[name].nbytes // _ALIGNMENT) * _ALIGNMENT
    made = EncodedKV(encoding, kv.dtype, torch.empty(end, dtype=torch.uint8, device=kv.device), places)
    views = made.tensors
    for start in range(0, layers, _LAYERS_AT_ONCE):
        part = slice(start, start + _LAYERS_AT_ONCE)
        for name, tensor in encode(kv[part], encoding).items():
            views[name][part].copy_(tensor)
    return made


def _shape(encoding: Encoding, places: Mapping[str, Place]) -> Shape:
    values = places["values"].shape
    layers, tokens, heads, dim = values if encoding != "int4" else (*values[:3], 0)
    if encoding == "int4":
        whole = places["whole"].shape
        tokens, dim = tokens + whole[2], whole[4]
    if min(layers, heads, dim) < 1:
        raise ValueError(f"values of shape {values}")
    return layers, 2, tokens, heads, dim


__all__ = ["KV", "EncodedKV", "Place", "buffer_of", "encoded", "in_buffer"]
