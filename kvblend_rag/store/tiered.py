"""TieredStore: fast tiers in front of a durable one, as one store."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from kvblend_rag.blend.choice import READS_AT_ONCE
from kvblend_rag.errors import ChunkDamaged, ChunkMissing, StoreError
from kvblend_rag.report import TierLoad
from kvblend_rag.store.base import ChunkStore, StoredChunk
from kvblend_rag.store.catalogue import Catalogue
from kvblend_rag.store.encoded import KV
from kvblend_rag.store.memory import MemoryStore


class _Reads:
    """What was read by one call, by tier, by any of its threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loads: dict[str, TierLoad] = {}

    def add(self, tier: str, nbytes: int, seconds: float) -> None:
        with self._lock:
            before = self._loads.get(tier, TierLoad(tier=tier, chunks=0, bytes=0, milliseconds=0.0))
            self._loads[tier] = TierLoad(
                tier=tier,
                chunks=before.chunks + 1,
                bytes=before.bytes + nbytes,
                milliseconds=before.milliseconds + seconds * 1e3,
            )

    def loads(self) -> list[TierLoad]:
        with self._lock:
            return list(self._loads.values())


class TieredStore(ChunkStore):
    """Reads from the fastest tier that holds a chunk, writes through to all.

    The last tier is the durable one: its errors are the caller's to know. The others are caches, and
    what goes wrong in them costs time only.

    Args:
        tiers: at least one, the fastest first.
        catalogue: when chunks are listed for all tiers together, and closed with this store: one that no
            tier holds any more loses its row. None: the durable tier looks after the rows itself.
    """

    name = "tiered"

    def __init__(self, tiers: Sequence[ChunkStore], catalogue: Catalogue | None = None) -> None:
        *self._caches, self._durable = tiers
        self._catalogue = catalogue

    @property
    def tiers(self) -> tuple[ChunkStore, ...]:
        """The tiers, the fastest first."""
        return (*self._caches, self._durable)

    def put(self, chunk: StoredChunk) -> None:
        """Write a chunk to the durable tier, then keep it in the caches."""
        self._durable.put(chunk)
        # an answer must not depend on whether a chunk was read back since it was computed
        self._promote(self._durable.as_stored(chunk), self._caches)

    def read(self, key: str) -> StoredChunk:
        """A chunk from the fastest tier that holds it, which then stands in all faster ones."""
        return self._read(key)[0]

    def get_with_tier(self, key: str) -> tuple[KV, str]:
        """A chunk's KV and the name of the tier it came from; raises what ``read`` raises."""
        chunk, tier = self._read(key)
        return chunk.kv, tier

    def get_many(self, keys: Iterable[str], loads: list[TierLoad] | None = None) -> dict[str, tuple[KV, str]]:
        """``get_with_tier`` of several chunks, by key, in the order given.

        What no tier of this machine holds is fetched at the same time: a server that is far away is waited for once,
        and one that does not answer costs one timeout, not one a chunk.

        Args:
            keys: of the chunks.
            loads: what was read is appended here, by tier, also where a chunk could not be read.
        """
        keys, reads = list(dict.fromkeys(keys)), _Reads()

        def get(key: str) -> tuple[KV, str]:
            chunk, tier = self._read(key, reads)
            return chunk.kv, tier

        near = [tier for tier in self.tiers if not tier.remote]
        far = [key for key in keys if not any(tier.contains(key) for tier in near)]
        fetched: dict[str, tuple[KV, str]] = {}
        try:
            if len(far) > 1 and len(near) < len(self.tiers):
                with ThreadPoolExecutor(min(len(far), READS_AT_ONCE)) as pool:
                    fetched = dict(zip(far, pool.map(get, far), strict=True))
            return {key: fetched.get(key) or get(key) for key in keys}
        finally:
            if loads is not None:
                loads += reads.loads()

    def locate(self, key: str) -> str | None:
        """The name of the fastest tier that holds a chunk, if any."""
        return next((tier.name for tier in self.tiers if tier.contains(key)), None)

    def prefetch(self, keys: Iterable[str]) -> int:
        """Bring chunks into the caches, so far as these have room; returns how many are in the fastest now.

        A chunk that can't be read is passed over: whoever needs it will be told.
        """
        keys = list(dict.fromkeys(keys))
        for key in keys:
            if not self.tiers[0].contains(key):
                with contextlib.suppress(StoreError):
                    self.read(key)
        return sum(self.tiers[0].contains(key) for key in keys)

    def contains(self, key: str) -> bool:
        """Whether any tier holds the chunk."""
        return self.locate(key) is not None

    def keeps(self, key: str) -> bool:
        """Whether the durable tier holds the chunk, once every removal that is under way is done."""
        return self._durable.keeps(key)

    def take_changes(self) -> dict[str, bool]:
        """Chunks that came into host memory (True) or left it since the last call; none without such a tier."""
        first = self.tiers[0]
        return first.take_changes() if isinstance(first, MemoryStore) else {}

    def delete(self, keys: Iterable[str]) -> None:
        """Forget chunks in every tier; what a remote one does not hear of now, ``sync`` makes up for.

        Raises:
            StoreError: a tier could not do it; the others have.
        """
        keys = list(keys)
        if self._catalogue is not None:
            self._catalogue.remove(keys)
        problem: StoreError | None = None
        for tier in reversed(self.tiers):
            try:
                tier.delete(keys)
            except StoreError as error:
                problem = problem or error
                if self._catalogue is not None and tier.remote:
                    self._catalogue.put_off(keys)
        if problem is not None:
            raise problem

    def delete_unheld(self, keys: Iterable[str]) -> list[str]:
        """Forget, in every tier, those of the chunks that no document holds; returns their keys."""
        if self._catalogue is not None:
            gone = self._catalogue.remove(keys, unless_held=True)
            self.delete(gone)
            return gone
        gone = self._durable.delete_unheld(keys)
        for tier in self._caches:
            tier.delete(gone)
        return gone

    def touch(self, key: str) -> None:
        """Count a use in every tier."""
        for tier in self.tiers:
            tier.touch(key)

    def nbytes(self) -> int:
        """Bytes in the durable tier; the caches hold nothing that it doesn't."""
        return self._durable.nbytes()

    def close(self) -> None:
        """Close every tier."""
        for tier in self.tiers:
            tier.close()
        if self._catalogue is not None:
            self._catalogue.close()

    def _read(self, key: str, reads: _Reads | None = None) -> tuple[StoredChunk, str]:
        problem: StoreError | None = None
        for depth, tier in enumerate(self.tiers):
            started = time.perf_counter()
            try:
                chunk = tier.read(key)
            except StoreError as error:
                # damage in one tier outranks absence from the next, and a tier that can't be asked outranks both;
                # of absences the last one counts, whose sentence says what to do
                if problem is None or isinstance(problem, ChunkMissing) or _weight(error) > _weight(problem):
                    problem = error
                continue
            self._promote(chunk, self._caches[:depth])
            if reads is not None:
                reads.add(tier.name, chunk.kv.nbytes, time.perf_counter() - started)
            for slower in self.tiers[depth + 1 :]:
                slower.touch(key)
            return chunk, tier.name
        assert problem is not None
        if isinstance(problem, (ChunkMissing, ChunkDamaged)):
            self._unlist(key)
        raise problem

    def _unlist(self, key: str) -> None:
        # a writer may have put it meanwhile; should its row go all the same, the chunk is computed once more
        with contextlib.suppress(StoreError):
            if self._catalogue is not None and not self.contains(key):
                self._catalogue.remove([key])

    def _promote(self, chunk: StoredChunk, caches: Sequence[ChunkStore]) -> None:
        for cache in caches:
            with contextlib.suppress(StoreError):
                cache.put(chunk)


def _weight(error: StoreError) -> int:
    return 0 if isinstance(error, ChunkMissing) else 1 if isinstance(error, ChunkDamaged) else 2


__all__ = ["TieredStore"]
