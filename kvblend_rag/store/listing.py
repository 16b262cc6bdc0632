"""Put and list: a chunk into the store and into the catalogue, so that neither is without the other."""

from __future__ import annotations

from collections.abc import Sequence

from kvblend_rag.errors import StoreFull
from kvblend_rag.store.base import ChunkStore, StoredChunk
from kvblend_rag.store.catalogue import Catalogue
from kvblend_rag.store.layout import Shard
from kvblend_rag.store.tables import ChunkRow

_ATTEMPTS = 3


def put_and_list(store: ChunkStore, catalogue: Catalogue, chunks: Sequence[StoredChunk], shard: Shard) -> None:
    """Store chunks and list them; when this returns, each is durable and was there after its row was.

    Between a file and its row, somebody else may evict the file: it has no row yet that could go with it.
    So whoever lists looks again afterwards, behind the evictions that were under way, and puts anew what left.

    Args:
        store: where the tensors go.
        catalogue: of the same store.
        chunks: whole, as this rank holds them.
        shard: this rank's (rank, ranks).

    Raises:
        StoreFull: no space is left, or chunks leave as fast as they come.
        StoreError: the store or its catalogue can't be written.
    """
    left = list(chunks)
    for _ in range(_ATTEMPTS):
        for chunk in left:
            store.put(chunk)
        catalogue.add_rows(
            ChunkRow(chunk.key, chunk.namespace, chunk.token_ids, *shard, chunk.kv.nbytes) for chunk in left
        )
        left = [chunk for chunk in left if not store.keeps(chunk.key)]
        if not left:
            return
    catalogue.remove([chunk.key for chunk in left])
    raise StoreFull(
        f"{len(left)} chunks left the store while they were listed: others need the room, so raise max_disk_gb."
    )


__all__ = ["put_and_list"]
