"""KV in fewer bits: the right size, the error that the bits allow, and the same from every tier."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from kvblend_rag.config import BlendConfig
from kvblend_rag.store import DiskStore, MemoryStore, StoreLayout, TieredStore, layout_of
from kvblend_rag.store.base import StoredChunk
from kvblend_rag.store.chunk_file import encode_chunk
from kvblend_rag.store.encoded import EncodedKV
from kvblend_rag.store.encoding import ENCODINGS, WHOLE_TOKENS, decode, encode, round_trip
from kvblend_rag.store.seal import Seal

LOSSY = [name for name in ENCODINGS if name != "none"]


def kv_like(tokens=100, layers=2, heads=2, dim=64, seed=0, dtype=torch.float32):
    """Keys with channels, and values with tokens, that are ten times as large as the rest."""
    generator = torch.Generator().manual_seed(seed)
    kv = torch.randn(layers, 2, tokens, heads, dim, generator=generator)
    kv[:, 0, :, :, ::7] *= 10
    kv[:, 1, ::5] *= 10
    return kv.to(dtype)


def error(kv, back):
    """Relative error of keys and of values."""
    return [((back - kv)[:, i].float().norm() / kv[:, i].float().norm()).item() for i in (0, 1)]


@pytest.mark.parametrize(("encoding", "most"), [("none", 0.0), ("int8", 0.01), ("fp8", 0.04), ("int4", 0.12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error(encoding, most, dtype):
    kv = kv_like(dtype=dtype)
    back = round_trip(kv, encoding)
    assert back.dtype == dtype
    assert back.shape == kv.shape
    assert max(error(kv, back)) <= most
    assert (max(error(kv, back)) > 0) == (encoding != "none")


def test_each_is_scaled_along_its_own_direction():
    """Scaled the other way round, the large channels and tokens would cost the rest their bits."""
    kv = kv_like()
    turned = kv.flip(1)  # values in the place of keys
    for encoding in ("int8", "int4"):
        right, wrong = error(kv, round_trip(kv, encoding)), error(turned, round_trip(turned, encoding))
        assert sum(wrong) > 1.3 * sum(right)


def test_int4_keeps_the_first_tokens_whole():
    kv = kv_like()
    back = round_trip(kv, "int4")
    assert torch.equal(back[:, :, :WHOLE_TOKENS], kv[:, :, :WHOLE_TOKENS])
    assert not torch.equal(back[:, :, WHOLE_TOKENS:], kv[:, :, WHOLE_TOKENS:])


@pytest.mark.parametrize(("encoding", "least"), [("fp8", 1.85), ("int8", 1.85), ("int4", 2.9)])
def test_size_against_bfloat16(encoding, least):
    kv = kv_like(tokens=256, dim=128, dtype=torch.bfloat16)
    assert kv.nbytes / sum(tensor.nbytes for tensor in encode(kv, encoding).values()) > least


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    tokens=st.integers(1, 70),
    dim=st.sampled_from([2, 4, 8, 24, 32, 64, 80]),
    heads=st.integers(1, 3),
    encoding=st.sampled_from(ENCODINGS),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 1e3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape(tokens, dim, heads, encoding, scale, dtype):
    kv = (kv_like(tokens, 1, heads, dim) * scale).to(dtype)
    tensors = encode(kv, encoding)
    back = decode(tensors, encoding, dtype)
    assert back.shape == kv.shape
    assert back.isfinite().all()
    # no value is further away than a step of the coarsest scale, 15 steps from lowest to highest
    assert (back.float() - kv.float()).abs().max() <= 0.08 * kv.float().abs().max() + 1e-5


@pytest.mark.parametrize("seal", [None, Seal(bytes(32))])
@pytest.mark.parametrize("tokens", [1, 5, 37])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_files(root, make, encoding, tokens, seal):
    chunk = StoredChunk(make(1).key, "s", make(1, tokens=tokens).token_ids, kv_like(tokens, 1, 3, 24))
    store = DiskStore(StoreLayout(root, encoding=encoding, seal=seal))
    store.put(chunk)
    for other in ENCODINGS:  # what is read says itself how it was written
        read = DiskStore(StoreLayout(root, encoding=other, seal=seal)).read(chunk.key)
        assert torch.equal(read.kv, round_trip(chunk.kv, encoding))
        assert read.token_ids.tolist() == chunk.token_ids.tolist()
    if seal is None:
        (path,) = StoreLayout(root).chunks.rglob("*.safetensors")
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == {"kv", "token_ids"}
            kv, shape = file.get_tensor("kv"), file.metadata().get("shape")
            if encoding == "none":
                assert shape is None
                assert torch.equal(kv, chunk.kv)
            else:
                kept = EncodedKV(encoding, chunk.kv.dtype, tuple(map(int, shape.split())), kv.flatten()).tensors
                for name, tensor in encode(chunk.kv, encoding).items():
                    assert torch.equal(kept[name].float(), tensor.float())


@pytest.mark.parametrize("encoding", LOSSY)
def test_memory_gives_what_the_disk_will_give(root, make, encoding):
    store = TieredStore([MemoryStore(1 << 30), DiskStore(StoreLayout(root, encoding=encoding))])
    store.put(make(1, tokens=40))
    fresh, tier = store.get_with_tier(make(1, tokens=40).key)
    assert tier == "memory"
    store.tiers[0].close()
    again, tier = store.get_with_tier(make(1, tokens=40).key)
    assert tier == "disk"
    assert torch.equal(fresh, again)
    assert not torch.equal(fresh, make(1, tokens=40).kv)


def test_as_computed_is_the_file_it_was_before(make):
    (head, *_) = encode_chunk(StoreLayout("x"), make(1), (0, 1))
    assert b'"format":"1"' in bytes(head)


def test_an_encoding_of_a_later_release_is_said(root, make):
    from blake3 import blake3

    from kvblend_rag.errors import ChunkDamaged
    from kvblend_rag.store.chunk_file import _BLANK, _CHECKSUM

    layout = StoreLayout(root, encoding="int8")
    store = DiskStore(layout)
    store.put(make(1))
    path = layout.chunk_path(make(1).key, (0, 1))
    text = path.read_bytes().replace(b'"format":"1 int8"', b'"format":"1 int3"')
    found = _CHECKSUM.search(text)
    text = text[: found.start(1)] + _BLANK + text[found.end(1) :]
    path.write_bytes(text.replace(_BLANK, blake3(text).hexdigest().encode(), 1))
    with pytest.raises(ChunkDamaged, match="int3"):
        store.read(make(1).key)


def test_the_setting(root):
    assert layout_of(BlendConfig(store_path=str(root), encoding="int4")).encoding == "int4"
