"""KV that is read as it lies: verified, counted by what it takes, and decoded to what it always was."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from blake3 import blake3

from kvblend_rag.blend.chunk import chunk_key
from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import ChunkDamaged
from kvblend_rag.store import DiskStore, MemoryStore, StoreLayout, TieredStore, open_store
from kvblend_rag.store.base import StoredChunk
from kvblend_rag.store.chunk_file import _BLANK, decode_chunk, encode_chunk, read_chunk, write_chunk
from kvblend_rag.store.encoded import EncodedKV, encoded
from kvblend_rag.store.encoding import ENCODINGS, encode, kept_as, round_trip
from kvblend_rag.store.seal import Seal

LOSSY = [name for name in ENCODINGS if name != "none"]
SHARD = (0, 1)


def chunk(tokens=40, dim=24, dtype=torch.bfloat16, heads=3):
    token_ids = np.arange(tokens, dtype=np.int32)
    generator = torch.Generator().manual_seed(tokens)
    kv = torch.randn(2, 2, tokens, heads, dim, generator=generator).to(dtype)
    return StoredChunk(chunk_key("s", token_ids), "s", token_ids, kv)


@pytest.mark.parametrize("seal", [None, Seal(bytes(32))])
@pytest.mark.parametrize("tokens", [1, 4, 5, 37])
@pytest.mark.parametrize("encoding", LOSSY)
def test_a_file_read_as_it_lies_decodes_to_what_it_was(root, encoding, tokens, seal):
    layout = StoreLayout(root, encoding=encoding, seal=seal, decoding=False)
    stored = chunk(tokens)
    DiskStore(layout).put(stored)
    read, decoded = DiskStore(layout).read(stored.key), DiskStore(dataclasses.replace(layout, decoding=True))
    assert isinstance(read.kv, EncodedKV)
    assert read.kv.encoding == encoding
    assert (read.kv.shape, read.kv.dtype) == (tuple(stored.kv.shape), stored.kv.dtype)
    assert torch.equal(read.decoded(), round_trip(stored.kv, encoding))
    assert torch.equal(decoded.read(stored.key).kv, read.decoded())
    assert torch.equal(DiskStore(layout).get(stored.key), read.decoded())
    for layer in (0, 1):
        assert torch.equal(read.kv.decode_layer(layer, torch.device("cpu")), read.decoded()[layer])
    assert read.token_ids.tolist() == stored.token_ids.tolist()


@pytest.mark.parametrize("encoding", LOSSY)
def test_a_layer_lies_together(encoding):
    for kv in (encoded(chunk().kv, encoding), encoded(chunk(3).kv, encoding)):
        assert len(kv.starts) == len(kv.tensors)
        assert kv.nbytes == 2 * kv.layer_nbytes
        for start, tensor in zip(kv.starts, kv.tensors.values(), strict=True):
            assert start % 64 == 0
            for layer in (0, 1):
                wanted = tensor[layer].contiguous().view(-1).view(torch.uint8)
                at = layer * kv.layer_nbytes + start
                assert torch.equal(kv.buffer[at : at + len(wanted)], wanted)


@pytest.mark.parametrize("encoding", LOSSY)
def test_a_shape_that_is_not_the_buffers_is_refused(encoding):
    kv = encoded(chunk(40).kv, encoding)
    for shape in (
        (2, 2, 104, 3, 24),
        (3, 2, 40, 3, 24),
        (2, 2, 40, 3, 160),
        (2, 1, 40, 3, 24),
        (2, 2, 0, 3, 24),
        (2, 2),
    ):
        with pytest.raises(ValueError, match="KV of shape"):
            EncodedKV(encoding, kv.dtype, shape, kv.buffer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("encoding", LOSSY)
def test_what_an_encoding_keeps_is_said_beforehand(encoding, dtype):
    for tokens, dim in ((1, 2), (4, 32), (5, 33), (100, 80)):
        kv = chunk(tokens, dim, dtype).kv
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in encode(kv, encoding).items()}
        assert list(found.items()) == list(kept_as(tuple(kv.shape), encoding, dtype).items())


@pytest.mark.parametrize("encoding", LOSSY)
def test_many_layers_are_encoded_as_each_of_them(encoding):
    generator = torch.Generator().manual_seed(0)
    kv = torch.randn(9, 2, 21, 2, 40, generator=generator).to(torch.bfloat16) * torch.arange(1, 10).view(9, 1, 1, 1, 1)
    made = encoded(kv, encoding)
    assert {name: tensor.shape for name, tensor in made.tensors.items()} == {
        name: tensor.shape for name, tensor in encode(kv, encoding).items()
    }
    assert torch.equal(made.decode(), round_trip(kv, encoding))
    assert torch.equal(made.decode_layer(7, torch.device("cpu")), round_trip(kv[7:8], encoding)[0])


@pytest.mark.parametrize("encoding", LOSSY)
def test_every_byte_is_verified(root, encoding):
    layout = StoreLayout(root, encoding=encoding, decoding=False)
    stored, path = chunk(9), layout.chunk_path(chunk(9).key, SHARD)
    layout.create()
    write_chunk(layout, path, encode_chunk(layout, stored, SHARD))
    content = path.read_bytes()
    for at in range(0, len(content), 61):
        path.write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
        with pytest.raises(ChunkDamaged):
            read_chunk(layout, path, stored.key, SHARD)
    for length in (0, 7, 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ChunkDamaged):
            read_chunk(layout, path, stored.key, SHARD)


@pytest.mark.parametrize("decoding", [True, False])
@pytest.mark.parametrize("encoding", LOSSY)
def test_tensors_that_do_not_fit_together_are_refused(encoding, decoding):
    """With a right checksum, as anybody can make one: a kernel must never read beyond them."""
    layout, stored = StoreLayout("x", encoding=encoding, decoding=decoding), chunk(40)
    raw = b"".join(encode_chunk(layout, stored, SHARD))
    size = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    header["__metadata__"]["checksum"] = _BLANK.decode()

    def read(changed):
        text = json.dumps(changed, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % 64)
        head = len(text).to_bytes(8, "little") + text
        whole = head.replace(_BLANK, blake3(head + data).hexdigest().encode(), 1) + data
        return decode_chunk(layout, torch.frombuffer(bytearray(whole), dtype=torch.uint8), "f", stored.key, SHARD)

    assert torch.equal(read(header).decoded(), round_trip(stored.kv, encoding))
    entry, metadata = header["kv"], header["__metadata__"]
    first, last = entry["data_offsets"]
    changes = [{**entry, "shape": [*entry["shape"], 1]}, {**entry, "data_offsets": [first, last + len(data)]}]
    changes += [{**entry, "shape": entry["shape"][::-1]}, {**entry, "data_offsets": [first, last - 64]}]
    changes += [{**entry, "shape": [float(size) for size in entry["shape"]]}, {**entry, "dtype": "I32"}, {}]
    changed = [{**header, "kv": change} for change in changes]
    changed += [{other: found for other, found in header.items() if other != "kv"}]
    shapes = ("", "2 2 40 3", "2 2 104 3 24", "2 1 40 3 24", "-2 2 40 3 24", "2 2 40 3 2.4", "1 2 80 3 24")
    changed += [{**header, "__metadata__": {**metadata, "shape": shape}} for shape in shapes]
    changed += [{**header, "__metadata__": {name: said for name, said in metadata.items() if name != "shape"}}]
    for each in changed:
        with pytest.raises(ChunkDamaged, match="none of ours"):
            read(each)
    wrong = {**header, "__metadata__": {**metadata, "format": "1 int4" if encoding != "int4" else "1 fp8"}}
    with pytest.raises(ChunkDamaged, match="none of ours"):
        read(wrong)


@pytest.mark.parametrize("encoding", LOSSY)
def test_memory_holds_it_encoded_and_counts_what_it_holds(root, encoding):
    store = TieredStore([MemoryStore(1 << 30), DiskStore(StoreLayout(root, encoding=encoding, decoding=False))])
    stored = chunk(400, 64, heads=2)
    store.put(stored)
    memory, disk = store.tiers
    fresh, tier = store.get_with_tier(stored.key)
    assert (tier, fresh.encoding) == ("memory", encoding)
    assert memory.nbytes() == fresh.nbytes < 0.6 * stored.kv.nbytes
    assert fresh.buffer.untyped_storage().nbytes() == fresh.nbytes
    memory.close()
    again, tier = store.get_with_tier(stored.key)
    assert tier == "disk"
    assert memory.nbytes() == again.nbytes < 0.6 * stored.kv.nbytes
    assert again.buffer.untyped_storage().nbytes() < 1.125 * again.nbytes + 4096
    assert torch.equal(fresh.decode(), again.decode())
    loads = []
    store.get_many([stored.key], loads)
    assert [(load.tier, load.bytes) for load in loads] == [("memory", again.nbytes)]
    small = MemoryStore(int(0.6 * stored.kv.nbytes))
    small.put(disk.read(stored.key))
    assert small.contains(stored.key)


def test_an_encoded_chunk_is_stored_as_it_is(root):
    """As one that comes from a remote tier: decoded and encoded again, it could be another."""
    first = DiskStore(StoreLayout(root / "a", encoding="int8", decoding=False))
    first.put(chunk())
    read = first.read(chunk().key)
    for encoding in ENCODINGS:
        second = DiskStore(StoreLayout(root / encoding, encoding=encoding, decoding=False))
        second.put(read)
        assert second.read(read.key).kv.encoding == "int8"
        assert torch.equal(second.get(read.key), read.decoded())
        assert second.as_stored(read) is read


def test_encodings_stand_beside_one_another(root):
    for encoding, tokens in zip(ENCODINGS, (10, 20, 30, 40), strict=True):
        DiskStore(StoreLayout(root, encoding=encoding)).put(chunk(tokens))
    store = open_store(BlendConfig(store_path=str(root), encoding="fp8"), decoding=False)
    for encoding, tokens in zip(ENCODINGS, (10, 20, 30, 40), strict=True):
        read = store.read(chunk(tokens).key)
        assert getattr(read.kv, "encoding", "none") == encoding
        assert torch.equal(read.decoded(), round_trip(chunk(tokens).kv, encoding))
    store.close()
    store = open_store(BlendConfig(store_path=str(root), encoding="fp8"))
    assert all(isinstance(store.read(chunk(tokens).key).kv, torch.Tensor) for tokens in (10, 20, 30, 40))
    store.close()
