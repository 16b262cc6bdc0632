import numpy as np
import pytest
import torch

from kvblend_rag.blend.chunk import chunk_key
from kvblend_rag.store import Catalogue, DiskStore, StoredChunk

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
        store.put(chunk)
        catalogue.add(chunk.key, chunk.namespace, chunk.token_ids, rank, size, chunk.kv.nbytes)

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
