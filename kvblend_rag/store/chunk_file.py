"""One chunk on disk: a safetensors file that can't be half written and can't be misread.

The tensors are ``kv``, (layers, 2, tokens, kv_heads, head_dim) or, encoded, (layers, bytes) as ``EncodedKV`` has
them, and ``token_ids`` (int32); the metadata are format, key, namespace, shard, dtype, shape where the KV is encoded,
and checksum. The checksum (BLAKE3) covers every byte of the file, header included, with its own digits taken as zeros.

Encrypted, the only tensor is ``sealed`` (uint8): such a file, sealed as a whole. Its metadata stay readable.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from blake3 import blake3

from kvblend_rag.errors import ChunkDamaged, ChunkMissing, StoreError
from kvblend_rag.store.base import StoredChunk
from kvblend_rag.store.encoded import KV, EncodedKV, encoded
from kvblend_rag.store.encoding import ENCODINGS, Encoding, round_trip
from kvblend_rag.store.layout import Shard, StoreLayout, mark_used, store_error, sync_folder
from kvblend_rag.store.seal import Sealed

_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_Part: TypeAlias = tuple[str, str, list[int], memoryview]
"""A tensor of a file: name, dtype, shape, bytes."""
_BLANK = b"0" * 64
_CHECKSUM = re.compile(rb'"checksum":"([0-9a-f]{64})"')
_ALIGNMENT = 64
_MAX_HEADER = 65_536
_NOT_OURS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What reading a header can raise that nobody of ours wrote, though its checksum is right."""
_SEALED = " sealed "
"""Between version and key in the format of an encrypted file."""


def encode_chunk(layout: StoreLayout, chunk: StoredChunk, shard: Shard) -> list[memoryview]:
    """The bytes of a chunk's file, in parts that aren't copied together; what is encoded stays as it is.

    Raises:
        StoreError: no chunk: another shape or dtype, or on a device.
    """
    kv = chunk.kv
    token_ids = np.ascontiguousarray(chunk.token_ids, dtype="<i4")
    if kv.device.type != "cpu" or kv.dtype not in _CACHE_DTYPES:
        known = ", ".join(map(str, _CACHE_DTYPES))
        raise StoreError(f"A {kv.dtype} tensor on {kv.device} can't be stored: give one of {known} on the host.")
    if len(kv.shape) != 5 or kv.shape[1] != 2 or token_ids.shape != (kv.shape[2],):
        raise StoreError(
            f"KV of shape {tuple(kv.shape)} for {token_ids.size} tokens can't be stored: "
            "it must be (layers, 2, tokens, kv_heads, head_dim)."
        )
    kept = kv if isinstance(kv, EncodedKV) else encoded(kv.detach().contiguous(), layout.encoding)
    format, metadata = f"{layout.version}", {"dtype": _DTYPE_NAMES[kv.dtype]}
    if isinstance(kept, EncodedKV):
        format += f" {kept.encoding}"
        metadata["shape"] = " ".join(map(str, kept.shape))
        kept = kept.buffer.view(kept.shape[0], -1)
    parts = [_part("kv", kept), ("token_ids", "I32", list(token_ids.shape), token_ids.data.cast("B"))]
    plain = _encoded(format, chunk, shard, parts, **metadata)
    if layout.seal is None:
        return plain
    sealed = layout.seal.seal(b"".join(plain), _context(chunk.key, shard))
    format = f"{layout.version}{_SEALED}{layout.seal.key_id.hex()}"
    return _encoded(format, chunk, shard, [("sealed", "U8", [len(sealed)], memoryview(sealed))])


def as_stored(layout: StoreLayout, chunk: StoredChunk) -> StoredChunk:
    """The chunk as it will be read back, which an encoding makes another than it was computed."""
    if isinstance(chunk.kv, EncodedKV):
        return chunk
    read = round_trip if layout.decoding else encoded
    return dataclasses.replace(chunk, kv=read(chunk.kv, layout.encoding))


def _part(name: str, tensor: torch.Tensor) -> _Part:
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return name, _DTYPE_NAMES[tensor.dtype], list(tensor.shape), data


def _encoded(format: str, chunk: StoredChunk, shard: Shard, parts: list[_Part], **metadata: str) -> list[memoryview]:
    tensors, data, offset = {}, [part[3] for part in parts], 0
    for name, dtype, shape, view in parts:
        tensors[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(view)]}
        offset += len(view)
    header: dict[str, Any] = {
        "__metadata__": {
            "format": format,
            "key": chunk.key,
            "namespace": chunk.namespace,
            "shard": _shard_name(shard),
            **metadata,
            "checksum": _BLANK.decode(),
        },
        **tensors,
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    size = len(text).to_bytes(8, "little")
    # one thread: BLAKE3's pool hangs in a process forked after its first use, and vLLM forks
    digest = blake3(size + text)
    for part in data:
        digest.update(part)
    head = size + text.replace(_BLANK, digest.hexdigest().encode(), 1)
    return [memoryview(head), *data]


def write_chunk(layout: StoreLayout, path: Path, parts: list[memoryview]) -> None:
    """Write a file so that its name stands for all of it or for nothing.

    When this returns, contents and name survive a power cut.

    Raises:
        StoreFull: no space is left; nothing is left behind.
        StoreError: the file can't be written.
    """
    temporary = layout.temporary_path(path)
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(exist_ok=True)
            sync_folder(path.parent.parent)
        try:
            _write_file(temporary, parts)
            with layout.lock():
                os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise store_error(error, path, "written") from error


def read_chunk(layout: StoreLayout, path: Path, key: str, shard: Shard) -> StoredChunk:
    """Read and verify one rank's part of a chunk; nothing unverified is ever returned.

    Raises:
        ChunkMissing: there is no such file.
        ChunkDamaged: it isn't, byte for byte, what was written for this key and shard.
        StoreError: it can't be read.
    """
    try:
        raw = _read_file(path)
    except FileNotFoundError as error:
        raise ChunkMissing(f"Chunk {key} is not in the store: ingest its text again.") from error
    except OSError as error:
        raise store_error(error, path, "read") from error
    return decode_chunk(layout, raw, path, key, shard)


def decode_chunk(layout: StoreLayout, raw: torch.Tensor, path: Path | str, key: str, shard: Shard) -> StoredChunk:
    """One rank's part of a chunk from the bytes of its file, verified and not copied.

    Args:
        layout: the format that is read.
        raw: uint8, shape (bytes,).
        path: where the bytes come from, for messages.
        key: the chunk that was asked for.
        shard: the rank's part that was asked for.

    Raises:
        ChunkDamaged: it isn't, byte for byte, what was written for this key and shard.
    """
    try:
        return _decoded(layout, raw, path, key, shard)
    except _NOT_OURS as error:
        raise _damaged(path, f"has a right checksum and a header that is none of ours ({error!r:.80})") from error


def _decoded(layout: StoreLayout, raw: torch.Tensor, path: Path | str, key: str, shard: Shard) -> StoredChunk:
    header, start = _verified_header(layout, raw, path)
    metadata = header["__metadata__"]
    written = (metadata["key"], metadata["shard"])
    if written != (key, _shard_name(shard)):
        raise _damaged(path, f"holds chunk {written[0]}, shard {written[1]}")
    if layout.seal is not None:
        opened = layout.seal.open(_slice(raw, header["sealed"], start).numpy().data, _context(key, shard))
        if opened is None:
            raise _damaged(path, "was not encrypted with this key")
        plain = torch.from_numpy(np.frombuffer(bytearray(opened), dtype=np.uint8))
        return decode_chunk(dataclasses.replace(layout, seal=None), plain, path, key, shard)
    token_ids = _slice(raw, header["token_ids"], start).numpy().tobytes()
    encoding = metadata["format"].partition(" ")[2] or "none"
    if encoding not in ENCODINGS:
        raise _damaged(path, f"has the encoding {encoding}, which this release does not read")
    kv = _kv(_slice(raw, header["kv"], start), header["kv"], encoding, metadata, layout.decoding)
    if len(kv.shape) != 5 or kv.shape[1] != 2 or len(token_ids) != 4 * kv.shape[2]:
        raise ValueError(f"KV of shape {tuple(kv.shape)}")
    return StoredChunk(key, str(metadata["namespace"]), np.frombuffer(token_ids, dtype="<i4"), kv)


def _kv(
    buffer: torch.Tensor, entry: dict[str, Any], encoding: Encoding, metadata: dict[str, str], decoding: bool
) -> KV:
    kept = buffer.view(_DTYPES[entry["dtype"]]).view(entry["shape"])
    if encoding == "none":
        return kept
    layers, two, tokens, heads, dim = map(int, metadata["shape"].split())
    kv = EncodedKV(encoding, _DTYPES[metadata["dtype"]], (layers, two, tokens, heads, dim), buffer)
    if kept.dtype != torch.uint8 or kept.shape != (layers, kv.layer_nbytes):
        raise ValueError(f"{kept.dtype} of shape {tuple(kept.shape)}")
    return kv.decode() if decoding else kv


def _write_file(path: Path, parts: list[memoryview]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # tells a clean-up that the writer is alive
        for part in parts:
            while part:
                part = part[os.write(descriptor, part) :]
        mark_used(descriptor)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_file(path: Path) -> torch.Tensor:
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            raw = torch.empty(size, dtype=torch.uint8)
        except RuntimeError as error:
            raise StoreError(f"{path} takes {size:,} bytes, more than there is memory for.") from error
        rest = raw.numpy().data
        while rest and (count := file.readinto(rest)):
            rest = rest[count:]
    return raw[: raw.numel() - len(rest)]


def _verified_header(layout: StoreLayout, raw: torch.Tensor, path: Path | str) -> tuple[dict[str, Any], int]:
    view = raw.numpy().data
    start = 8 + int.from_bytes(view[:8], "little")
    if not 8 < start <= min(len(view), _MAX_HEADER):
        raise _damaged(path, "is cut short or has no header")
    head = bytes(view[:start])
    found = _CHECKSUM.search(head)
    if found is None:
        raise _damaged(path, "has no checksum")
    digest = blake3(head[: found.start(1)] + _BLANK + head[found.end(1) :])
    digest.update(view[start:])
    if digest.hexdigest().encode() != found[1]:
        raise _damaged(path, "fails its checksum")
    # from here on the header is what a writer wrote, if not necessarily this version's
    header: dict[str, Any] = json.loads(head[8:])
    format, sealed, key_id = header["__metadata__"].get("format", "").partition(_SEALED)
    version = format.partition(" ")[0]
    if version != str(layout.version):
        raise _damaged(path, f"has format {version}, and this release reads {layout.version}")
    if sealed and (layout.seal is None or key_id != layout.seal.key_id.hex()):
        raise Sealed(f"{path} is encrypted with another key: set encryption_key to the one it was made with.")
    if layout.seal is not None and not sealed:
        raise _damaged(path, "is not encrypted")
    return header, start


def _slice(raw: torch.Tensor, entry: dict[str, Any], start: int) -> torch.Tensor:
    first, last = entry["data_offsets"]
    if not 0 <= first <= last <= raw.numel() - start:
        raise ValueError(f"a tensor from {first} to {last}")
    return raw[start + first : start + last]


def _context(key: str, shard: Shard) -> bytes:
    return f"{key} {_shard_name(shard)}".encode()


def _shard_name(shard: Shard) -> str:
    return f"{shard[0]}of{shard[1]}"


def _damaged(path: Path | str, how: str) -> ChunkDamaged:
    return ChunkDamaged(f"{path} {how}: ingest the chunk's text again.")


__all__ = ["as_stored", "decode_chunk", "encode_chunk", "read_chunk", "write_chunk"]
