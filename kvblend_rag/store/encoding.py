"""Encodings: KV as tensors that take less room, and back.

Keys have channels that are large at every token, so they are scaled by channel; values have large tokens, so they are
scaled by token (KIVI, https://arxiv.org/abs/2402.02750). The first tokens of a chunk draw much attention, and int4
keeps them whole. Shapes: KV is (layers, 2, tokens, kv_heads, head_dim); scales are float32 or, for int4, float16.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch

Encoding: TypeAlias = Literal["none", "fp8", "int8", "int4"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)

Tensors: TypeAlias = dict[str, torch.Tensor]
Shape: TypeAlias = tuple[int, int, int, int, int]
"""Of KV: layers, 2, tokens, kv_heads, head_dim."""

WHOLE_TOKENS = 4
"""Tokens at the start of a chunk that int4 keeps as computed."""
GROUP = 32
"""Values that share a scale and an offset in int4: tokens of a key's channel, channels of a token's value."""
_CODES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}
_LARGEST = {"fp8": 448.0, "int8": 127.0}
_TOKENS, _CHANNELS = 1, 3
_SMALLEST = 1e-12
_HALF = 65_504.0
"""The largest float16."""


def encode(kv: torch.Tensor, encoding: Encoding) -> Tensors:
    """KV as an encoding keeps it: ``kv`` alone as computed; otherwise keys and values with their scales."""
    if encoding == "none":
        return {"kv": kv}
    keys, values = kv[:, 0], kv[:, 1]
    if encoding == "int4":
        whole = kv[:, :, :WHOLE_TOKENS].contiguous()
        rest = {"keys": (keys[:, WHOLE_TOKENS:], _TOKENS), "values": (values[:, WHOLE_TOKENS:], _CHANNELS)}
        tensors = {"whole": whole}
        for name, (part, along) in rest.items():
            packed, scale, offset = _to_int4(part.float(), along)
            tensors |= {name: packed, f"{name}_scale": scale, f"{name}_offset": offset}
        return tensors
    tensors = {}
    for name, part, along in (("keys", keys, _TOKENS), ("values", values, _CHANNELS)):
        scale = part.float().abs().amax(along, keepdim=True).clamp_min(_SMALLEST) / _LARGEST[encoding]
        scaled = part.float() / scale
        tensors[name] = (scaled.round() if encoding == "int8" else scaled).to(_CODES[encoding])
        tensors[f"{name}_scale"] = scale
    return tensors


def decode(tensors: Tensors, encoding: Encoding, dtype: torch.dtype) -> torch.Tensor:
    """KV in the dtype of the cache, (layers, 2, tokens, kv_heads, head_dim).

    Raises:
        LookupError, RuntimeError, ValueError: the tensors are none of this encoding's.
    """
    if encoding == "none":
        return tensors["kv"]
    if encoding == "int4":
        whole = tensors["whole"]
        shape = (whole.shape[0], *whole.shape[3:])
        keys, values = (
            _from_int4(tensors[name], tensors[f"{name}_scale"], tensors[f"{name}_offset"], along, shape)
            for name, along in (("keys", _TOKENS), ("values", _CHANNELS))
        )
        parts = [keys[:, : values.shape[1]], values]
        return torch.cat([whole, torch.stack(parts, 1).to(dtype)], 2)
    layers, *rest = tensors["keys"].shape
    kv = torch.empty((layers, 2, *rest), dtype=dtype, device=tensors["keys"].device)
    for index, name in enumerate(("keys", "values")):
        codes = tensors[name].float() if encoding == "fp8" else tensors[name]
        torch.mul(codes, tensors[f"{name}_scale"], out=kv[:, index])  # in one pass, straight to where it belongs
    return kv


def kept_as(shape: Shape, encoding: Encoding, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of the tensors that an encoding makes of KV, by name, each with the layers first; not of none."""
    layers, two, tokens, heads, dim = shape
    codes = _CODES[encoding]
    if encoding != "int4":
        whole, channels, rows = (layers, tokens, heads, dim), (layers, 1, heads, dim), (layers, tokens, heads, 1)
        scales = torch.float32
        return {
            "keys": (codes, whole),
            "keys_scale": (scales, channels),
            "values": (codes, whole),
            "values_scale": (scales, rows),
        }
    rest = max(tokens - WHOLE_TOKENS, 0)
    keys, values = (layers, heads, dim, -(-rest // GROUP)), (layers, rest, heads, -(-dim // GROUP))
    kept: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"whole": (dtype, (layers, two, tokens - rest, heads, dim))}
    for name, groups in (("keys", keys), ("values", values)):
        kept[name] = codes, (*groups, GROUP // 2)
        kept |= {f"{name}_{part}": (torch.float16, (*groups, 1)) for part in ("scale", "offset")}
    return kept


def round_trip(kv: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    """KV as it comes back from an encoding."""
    return kv if encoding == "none" else decode(encode(kv, encoding), encoding, kv.dtype)


def _to_int4(part: torch.Tensor, along: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, two a byte, (…, groups, 16) uint8, and step and offset of each group, (…, groups, 1) float16."""
    groups = _grouped(part, along)
    low = groups.amin(-1, keepdim=True).clamp(-_HALF, _HALF).to(torch.float16)
    step = ((groups.amax(-1, keepdim=True) - low.float()) / 15).clamp(1e-6, _HALF).to(torch.float16)
    codes = ((groups - low.float()) / step.float()).round().clamp(0, 15).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, step, low


def _from_int4(
    packed: torch.Tensor, step: torch.Tensor, low: torch.Tensor, along: int, shape: tuple[int, ...]
) -> torch.Tensor:
    layers, heads, dim = shape
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    groups = codes.float() * step.float() + low.float()
    if along == _CHANNELS:
        return groups.flatten(-2)[..., :dim]
    return groups.flatten(-2).permute(0, 3, 1, 2).reshape(layers, -1, heads, dim)


def _grouped(part: torch.Tensor, along: int) -> torch.Tensor:
    """The values in groups of 32 along tokens or channels, the last group filled up with its last value."""
    if along == _TOKENS:
        part = part.permute(0, 2, 3, 1)
    short = -part.shape[-1] % GROUP
    if short and part.shape[-1]:
        part = torch.cat([part, part[..., -1:].expand(*part.shape[:-1], short)], -1)
    return part.reshape(*part.shape[:-1], part.shape[-1] // GROUP, GROUP)


__all__ = [
    "ENCODINGS",
    "GROUP",
    "WHOLE_TOKENS",
    "Encoding",
    "Shape",
    "Tensors",
    "decode",
    "encode",
    "kept_as",
    "round_trip",
]
