import contextlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from kvblend_rag.blend.chunk import chunk_key
from kvblend_rag.config import BlendConfig
from kvblend_rag.store import Catalogue, DiskStore, StoredChunk
from kvblend_rag.store.listing import put_and_list
from kvblend_rag.store.open import open_remote

_spec = importlib.util.spec_from_file_location("store_servers", Path(__file__).with_name("servers.py"))
servers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(servers)

SPACE = "model-a"


@pytest.fixture
def root(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def make():
    """Chunks by number, each its own; ``kv`` is (2, 2, tokens, 2, 4)."""

    def make(number, tokens=8, dtype=torch.float32, space=SPACE, rank=0):
        token_ids = np.arange(number * 1000, number * 1000 + tokens, dtype=np.int32)
        generator = torch.Generator().manual_seed(number * 10 + rank)
        kv = torch.randn(2, 2, tokens, 2, 4, generator=generator).to(dtype)
        return StoredChunk(chunk_key(space, token_ids), space, token_ids, kv)

    return make


@pytest.fixture
def same():
    def same(left, right):
        assert (left.key, left.namespace) == (right.key, right.namespace)
        assert np.array_equal(left.token_ids, right.token_ids)
        assert left.kv.dtype == right.kv.dtype
        assert left.kv.shape == right.kv.shape
        assert torch.equal(left.kv.contiguous().view(torch.uint8), right.kv.contiguous().view(torch.uint8))

    return same


@pytest.fixture
def ingest():
    """What an ingest does: hold, write the tensors, then the row."""

    def ingest(store, catalogue, chunk, document="", rank=0, size=1):
        catalogue.hold(document, [chunk.key])
        put_and_list(store, catalogue, [chunk], (rank, size))

    return ingest


@pytest.fixture
def opened(root):
    """Open a store with its catalogue, as another process would; all are closed at the end."""
    stores = []

    def opened(**options):
        catalogue = Catalogue(root)
        store = DiskStore(root, catalogue=catalogue, **options)
        stores.append(store)
        return store, catalogue

    yield opened
    for store in stores:
        store.close()


@pytest.fixture(scope="session")
def ports(tmp_path_factory):
    """Where the real servers listen, by kind; each starts when it is first asked for."""
    folder, started = tmp_path_factory.mktemp("servers"), {}
    with contextlib.ExitStack() as stack:

        def port(kind):
            if kind not in started:
                started[kind] = servers.free_port()
                start = {"valkey": servers.valkey_server, "s3": servers.s3_server}[kind]
                stack.enter_context(start(folder / kind, started[kind]))
            return started[kind]

        yield port


@pytest.fixture
def address(ports, monkeypatch, tmp_path):
    """The URL of a remote tier that is empty, with options of ours."""
    for name, value in servers.ACCESS.items():
        monkeypatch.setenv(name, value)

    def address(kind, port=None, **options):
        port = port or ports(kind)
        if kind == "s3":
            base, options = "s3://chunks/" + tmp_path.name, {"endpoint": f"http://127.0.0.1:{port}", **options}
        else:
            base, options = f"redis://127.0.0.1:{port}", {"prefix": tmp_path.name, **options}
        return base + "?" + "&".join(f"{name}={value}" for name, value in options.items())

    return address


@pytest.fixture(params=["valkey", "s3"])
def kind(request):
    return request.param


@pytest.fixture
def remote(kind, address, root):
    """Open a remote tier, as another host would; all are closed at the end."""
    opened = []

    def remote(shard=(0, 1), **options):
        config = BlendConfig(store_path=str(root), remote=(address(kind, **options),))
        (store,) = open_remote(config, shard)
        opened.append(store)
        return store

    yield remote
    for store in opened:
        store.close()


@pytest.fixture
def proxy(kind, ports):
    proxy = servers.Proxy(ports(kind))
    yield proxy
    proxy.close()
