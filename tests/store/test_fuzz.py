"""Headers, keys and settings that nobody of ours wrote: an error of ours, and no file outside the store."""

import json
import os

import pytest
import torch
import yaml
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvblend_rag.blend.chunk import chunk_key
from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import ChunkDamaged, ConfigError, StoreError
from kvblend_rag.store import Catalogue, DiskStore, MemoryStore, StoreLayout
from kvblend_rag.store.base import StoredChunk
from kvblend_rag.store.check import check
from kvblend_rag.store.chunk_file import _BLANK, decode_chunk, encode_chunk
from kvblend_rag.store.seal import Seal, Sealed

KEY = chunk_key("s", torch.arange(3, dtype=torch.int32).numpy())
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
OFFSETS = st.lists(st.integers(-100, 400) | st.integers(), min_size=2, max_size=2)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F8_E4M3", "Q4"]) | JSON,
        "shape": st.lists(st.integers(-2, 9), max_size=6) | JSON,
        "data_offsets": OFFSETS | JSON,
    },
)
HEADER = st.fixed_dictionaries(
    {},
    optional={
        "kv": ENTRY | JSON,
        "token_ids": ENTRY | JSON,
        "sealed": ENTRY | JSON,
        "other": JSON,
    },
)
METADATA = st.fixed_dictionaries(
    {},
    optional={
        "format": st.just("1") | st.just("1 sealed 00000000") | JSON,
        "key": st.just(KEY) | JSON,
        "shard": st.just("0of1") | JSON,
        "namespace": JSON,
    },
)


def signed(header):
    """A file with this header and a right checksum, as anybody can make one."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    size = len(text).to_bytes(8, "little")
    data = bytes(range(200))
    digest = blake3(size + text + data).hexdigest().encode()
    return torch.frombuffer(bytearray(size + text.replace(_BLANK, digest, 1) + data), dtype=torch.uint8)


@QUICK
@given(header=HEADER, metadata=METADATA | JSON, seal=st.sampled_from([None, Seal(bytes(32))]))
def test_headers_with_a_right_checksum(header, metadata, seal):
    named = {**metadata, "checksum": _BLANK.decode()} if isinstance(metadata, dict) else [metadata, _BLANK.decode()]
    raw = signed({"__metadata__": named, **header})
    try:
        chunk = decode_chunk(StoreLayout("x", seal=seal), raw, "a file", KEY, (0, 1))
    except (ChunkDamaged, Sealed):
        return
    assert chunk.kv.ndim == 5
    assert chunk.kv.shape[1:3] == (2, len(chunk.token_ids))


def test_the_fuzz_above_reaches_what_it_is_for():
    """A header like a writer's is read, so what is refused is refused for its contents."""
    kv = torch.zeros(1, 2, 3, 1, 1)
    chunk = StoredChunk(KEY, "s", torch.arange(3, dtype=torch.int32).numpy(), kv)
    raw = torch.frombuffer(bytearray(b"".join(encode_chunk(StoreLayout("x"), chunk, (0, 1)))), dtype=torch.uint8)
    header = json.loads(bytes(raw[8 : 8 + int.from_bytes(bytes(raw[:8]), "little")]))
    header["__metadata__"]["checksum"] = _BLANK.decode()
    assert decode_chunk(StoreLayout("x"), signed(header), "a file", KEY, (0, 1)).kv.shape == kv.shape
    header["kv"]["data_offsets"] = [-8, 16]
    with pytest.raises(ChunkDamaged, match="none of ours"):
        decode_chunk(StoreLayout("x"), signed(header), "a file", KEY, (0, 1))
    header["kv"] = {"dtype": "F32", "shape": [1, 2, 2, 1, 1], "data_offsets": [0, 16]}
    with pytest.raises(ChunkDamaged, match="none of ours"):
        decode_chunk(StoreLayout("x"), signed(header), "a file", KEY, (0, 1))


@QUICK
@given(content=st.binary(max_size=300))
def test_any_bytes(content):
    with pytest.raises(ChunkDamaged):
        decode_chunk(StoreLayout("x"), torch.tensor(list(content), dtype=torch.uint8), "a file", KEY, (0, 1))


def test_nesting_deeper_than_python_goes():
    deep = b"[" * 30_000 + b'"checksum":"' + _BLANK + b'"'
    size = len(deep).to_bytes(8, "little")
    digest = blake3(size + deep).hexdigest().encode()
    raw = torch.frombuffer(bytearray(size + deep.replace(_BLANK, digest)), dtype=torch.uint8)
    with pytest.raises(ChunkDamaged, match="none of ours"):
        decode_chunk(StoreLayout("x"), raw, "a file", KEY, (0, 1))


TRICKS = [
    "../../etc/passwd", "..", "/etc/passwd", "a" * 31, "a" * 33, "A" * 32, "a" * 32 + "\n", "\0" * 32, "a" * 30 + "/.",
    "ａ" * 32, "", "." * 32, "~" + "a" * 31, "*" * 32, "a" * 16 + "%2f" + "a" * 13,
]  # fmt: skip


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def no_key_is_taken(tmp_path, key):
    root = tmp_path / "store"
    catalogue = Catalogue(root)
    before = tree(tmp_path)
    tokens = torch.arange(4, dtype=torch.int32).numpy()
    chunk = StoredChunk(key, "s", tokens, torch.zeros(1, 2, 4, 1, 1))
    disk, memory = DiskStore(root), MemoryStore(1 << 20)
    for act in (
        lambda: disk.put(chunk), lambda: disk.read(key), lambda: disk.contains(key), lambda: disk.delete([key]),
        lambda: disk.keeps(key), lambda: memory.put(chunk), lambda: catalogue.hold("d", [key]),
        lambda: catalogue.add(key, "s", tokens, 0, 1, 1),
    ):  # fmt: skip
        with pytest.raises(StoreError, match="32 lower-case"):
            act()
    assert [name for name in tree(tmp_path) if "sqlite" not in name and name != "store/lock"] == [
        name for name in before if "sqlite" not in name and name != "store/lock"
    ]
    catalogue.close()


@pytest.mark.parametrize("key", TRICKS)
def test_path_tricks_in_keys(tmp_path, key):
    no_key_is_taken(tmp_path, key)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(key=st.text(max_size=40).filter(lambda key: not (len(key) == 32 and set(key) <= set("0123456789abcdef"))))
def test_any_text_as_a_key(tmp_path_factory, key):
    no_key_is_taken(tmp_path_factory.mktemp("keys"), key)


def test_document_and_tenant_names_are_no_paths(root):
    catalogue = Catalogue(root)
    before = tree(root.parent)
    for name in TRICKS:
        catalogue.hold(name or "x", [KEY], tenant=name)
    assert [name for name in tree(root.parent) if "sqlite" not in name] == [
        name for name in before if "sqlite" not in name
    ]
    assert check(root).journal_lines == 0
    catalogue.close()


def test_names_in_the_chunk_folder_are_passed_over(root, make):
    store = DiskStore(root)
    store.put(make(1))
    folder = StoreLayout(root).chunk_path(make(1).key, (0, 1)).parent
    outside = root.parent / "outside"
    outside.write_text("mine")
    os.symlink(outside, folder / "link")
    os.symlink("..", folder / f"{'a' * 32}.r0of1.safetensors.x")
    (folder / ("b" * 32 + ".r0of1.safetensors.exe")).write_text("x")
    (folder / "sub").mkdir()
    assert [part.key for part in StoreLayout(root).chunk_files()] == [make(1).key]
    assert check(root, repair=True).files == 1
    store.delete([make(1).key])
    assert outside.read_text() == "mine"


def loaded(path):
    message = ""
    try:
        return BlendConfig.load(path)
    except ConfigError as error:
        message = str(error)
    assert "\n" not in message
    return None


@QUICK
@given(text=st.text(max_size=200) | st.text(alphabet="[]{}:-&*!|>'\"%@`#?, \n0x.naif", max_size=80))
def test_any_text_as_yaml(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("yaml") / "c.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    loaded(path)


@QUICK
@given(
    given=st.dictionaries(
        st.sampled_from([name for name in BlendConfig.__dataclass_fields__ if name != "model"]) | st.text(max_size=6),
        JSON | st.dates() | st.binary(max_size=4),
        max_size=3,
    )
)
def test_any_values_of_settings(tmp_path_factory, given):
    path = tmp_path_factory.mktemp("yaml") / "c.yaml"
    path.write_text(yaml.safe_dump(given))
    config = loaded(path)
    if config is not None:
        json.dumps(config.to_dict())


@pytest.mark.parametrize(
    "text", ["a: 2001-99-99", "[" * 5_000, "a: !!python/object/apply:os.system ['true']", "? [1]\n: 2", "a: &a [*a]",
             "remote: 's3://[bad'", "remote: 7", "remote: [redis://h, 7]", "remote: {a: b}", "recompute_ratio: .nan",
             "max_disk_gb: .inf", "chunk_size: 0b", "\x00"]
)  # fmt: skip
def test_yaml_that_was_a_traceback_somewhere(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert loaded(path) is None


@pytest.mark.parametrize("text", ["[", "2001-99-99", "[" * 5_000, "{a: b}"])
def test_the_environment_is_no_better(monkeypatch, text):
    monkeypatch.setenv("KVBLEND_CHUNK_SIZE", text)
    with pytest.raises(ConfigError, match=r"CHUNK_SIZE|chunk_size"):
        BlendConfig.load()
