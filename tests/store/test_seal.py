"""Encrypted at rest: nothing legible on any tier, nothing read that others wrote, no damage for want of a key."""

import numpy as np
import pytest
import torch
from safetensors import safe_open

from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import ChunkDamaged, ConfigError
from kvblend_rag.store import Catalogue, DiskStore, StoreLayout, layout_of, open_remote
from kvblend_rag.store.chunk_file import encode_chunk
from kvblend_rag.store.seal import Seal, Sealed
from kvblend_rag.store.sync import sync
from kvblend_rag.store.upkeep import check, gc

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))


@pytest.fixture
def layout(root):
    return StoreLayout(root, seal=Seal(KEY))


def everything_under(root):
    return b"".join(path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file())


def test_nothing_legible_lies_on_the_disk(root, layout, make, same, ingest):
    catalogue = Catalogue(layout)
    store = DiskStore(layout, catalogue=catalogue)
    chunk = make(1, tokens=40)
    ingest(store, catalogue, chunk, "doc")
    same(store.read(chunk.key), chunk)
    ((key, token_ids),) = catalogue.changes_since(0, chunk.namespace).added
    assert (key, token_ids.tolist()) == (chunk.key, chunk.token_ids.tolist())
    assert catalogue.stats()["tokens"] == 40
    store.close()
    written = everything_under(root)
    for secret in (chunk.token_ids.tobytes(), chunk.token_ids[:4].tobytes(), chunk.kv.numpy().tobytes()[:16]):
        assert secret not in written
    (path,) = StoreLayout(root).chunks.rglob("*.safetensors")
    with safe_open(path, "np") as file:
        assert list(file.keys()) == ["sealed"], "still a safetensors file"


def test_the_same_chunk_is_never_sealed_alike(layout, make):
    one, two = (b"".join(encode_chunk(layout, make(1), (0, 1))) for _ in range(2))
    assert len(one) == len(two)
    assert np.mean(np.frombuffer(one[-500:], np.uint8) == np.frombuffer(two[-500:], np.uint8)) < 0.1


@pytest.mark.parametrize("seal", [None, Seal(OTHER)])
def test_the_wrong_key_is_said_and_harms_nothing(root, layout, make, ingest, seal):
    catalogue = Catalogue(layout)
    store = DiskStore(layout, catalogue=catalogue)
    ingest(store, catalogue, make(1), "doc")
    wrong = StoreLayout(root, seal=seal)
    for act in (
        lambda: Catalogue(wrong),
        lambda: DiskStore(wrong).read(make(1).key),
        lambda: check(wrong, repair=True),
        lambda: gc(wrong),
    ):
        with pytest.raises(Sealed, match="encryption_key"):
            act()
    assert torch.equal(store.get(make(1).key), make(1).kv)
    assert check(layout, repair=True).ok
    store.close()


def test_what_somebody_else_wrote_is_not_read(root, layout, make):
    """With a right checksum, which anybody can compute."""
    DiskStore(root).put(make(1))
    with pytest.raises(ChunkDamaged, match="not encrypted"):
        DiskStore(layout).read(make(1).key)
    forged = DiskStore(layout)
    forged.put(make(2))
    path = layout.chunk_path(make(2).key, (0, 1))
    text = path.read_bytes().replace(make(2).key.encode(), make(3).key.encode())
    from blake3 import blake3

    from kvblend_rag.store.chunk_file import _BLANK, _CHECKSUM

    found = _CHECKSUM.search(text)
    blank = text[: found.start(1)] + _BLANK + text[found.end(1) :]
    digest = blake3(blank).hexdigest().encode()
    moved = layout.chunk_path(make(3).key, (0, 1))
    moved.parent.mkdir(exist_ok=True)
    moved.write_bytes(blank.replace(_BLANK, digest))
    with pytest.raises(ChunkDamaged, match="with this key"):
        forged.read(make(3).key)


def test_a_flipped_bit_anywhere_is_damage(root, layout, make):
    store = DiskStore(layout)
    chunk = make(1, tokens=2)
    path = layout.chunk_path(chunk.key, (0, 1))
    store.put(chunk)
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        raw = bytearray(whole)
        raw[position] ^= 1
        path.write_bytes(raw)
        with pytest.raises((ChunkDamaged, Sealed)):
            store.read(chunk.key)


def test_several_ranks_of_an_encrypted_chunk(layout, make, ingest):
    for rank in range(2):
        catalogue = Catalogue(layout)
        store = DiskStore(layout, shard=(rank, 2), catalogue=catalogue)
        ingest(store, catalogue, make(1, rank=rank), "doc", rank, 2)
    assert catalogue.missing([make(1).key]) == []
    assert check(layout).ok


def test_a_lost_catalogue_is_rebuilt_encrypted(root, layout, make, ingest):
    catalogue = Catalogue(layout)
    store = DiskStore(layout, catalogue=catalogue)
    ingest(store, catalogue, make(1, tokens=40), "doc")
    store.close()
    layout.catalogue.write_bytes(b"junk" * 4_096)
    assert check(layout, repair=True).files_without_row
    assert check(layout).ok
    assert make(1, tokens=40).token_ids.tobytes() not in everything_under(root)
    with pytest.raises(Sealed):
        Catalogue(root)


def test_on_a_server_and_for_another_host(kind, address, tmp_path, make, ingest, monkeypatch, same):
    monkeypatch.setenv("A_KEY", KEY.hex())
    here, there, blind = (
        BlendConfig(store_path=str(tmp_path / name), remote=(address(kind),), encryption_key=key)
        for name, key in (("here", "env:A_KEY"), ("there", "env:A_KEY"), ("blind", ""))
    )
    (far,) = open_remote(here)
    chunk = make(1, tokens=40)
    far.put(chunk)
    data = bytes(far._fetch(chunk.key, (0, 1)))
    assert chunk.token_ids[:4].tobytes() not in data
    if kind == "valkey":
        stored = far._client.hgetall(f"{far._prefix}:meta")
        assert chunk.token_ids[:4].tobytes() not in b"".join(stored.values())
    tiers = open_remote(there)
    assert sync(layout_of(there), tiers).listed == 1
    same(tiers[0].read(chunk.key), chunk)
    (outsider,) = open_remote(blind)
    with pytest.raises(Sealed):
        outsider.read(chunk.key)
    assert far.contains(chunk.key), "who lacks the key deletes nothing"


@pytest.mark.parametrize(
    ("content", "fits"),
    [(KEY, True), (KEY.hex().encode() + b"\n", True), (b"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=", True),
     (b"", False), (b"hunter2", False), (b"\xff" * 40, False)],
)  # fmt: skip
def test_keys_in_files(tmp_path, content, fits):
    path = tmp_path / "key"
    path.write_bytes(content)
    if fits:
        assert Seal.from_source(f"file:{path}").key_id == Seal(KEY).key_id
    else:
        with pytest.raises(ConfigError, match="holds no encryption key"):
            Seal.from_source(f"file:{path}")


@pytest.mark.parametrize("source", ["hunter2", "env:", "file:/no/such/file", "env:NOT_SET_ANYWHERE", KEY.hex()])
def test_sources_that_are_none(source):
    with pytest.raises(ConfigError) as caught:
        Seal.from_source(source)
    assert KEY.hex() not in str(caught.value)


def test_the_key_is_in_no_setting(monkeypatch, tmp_path):
    monkeypatch.setenv("A_KEY", KEY.hex())
    config = BlendConfig(store_path=str(tmp_path), encryption_key="env:A_KEY")
    assert KEY.hex() not in f"{config} {config.to_dict()} {layout_of(config)}"
    with pytest.raises(ConfigError, match="31 bytes"):
        Seal(KEY[:-1])
