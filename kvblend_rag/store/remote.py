"""RemoteStore: chunks on a server that many hosts share; what all such tiers have in common.

What travels is the chunk's file, byte for byte (``chunk_file``), so its checksum covers the way there and
back. Three things keep a bad server from harming a request:

- every call has a deadline, whatever its client does;
- a server that failed is left alone for a while, so that only one call in many waits for it;
- uses are counted behind the caller's back, in batches.
"""

from __future__ import annotations

import contextlib
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from kvblend_rag.blend.chunk import TokenIds, chunk_key
from kvblend_rag.errors import ChunkDamaged, ChunkMissing, StoreError, StoreFull, StoreUnreachable
from kvblend_rag.store.base import ChunkStore, StoredChunk
from kvblend_rag.store.chunk_file import as_stored, decode_chunk, encode_chunk
from kvblend_rag.store.layout import Shard, StoreLayout, checked_key

T = TypeVar("T")

WORD_KEPT_S = 30 * 86_400.0
"""How long a deletion stays on record for hosts that were away."""

_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
_USES_EVERY_S = 1.0
_MAX_USES = 100_000


class Part(NamedTuple):
    """One rank's part of a chunk, as a server lists it."""

    key: str
    shard: Shard
    nbytes: int


class RemoteStore(ChunkStore):
    """One rank's view of the chunks on a server.

    Args:
        place: the server and what in it, for messages; no secrets.
        layout: the format that is written and read.
        shard: tensor-parallel (rank, size).
        max_bytes: bound on the parts of all ranks together.
        timeout_s: the longest that any call here takes.
    """

    remote = True

    def __init__(self, place: str, layout: StoreLayout, shard: Shard, max_bytes: int, timeout_s: float) -> None:
        self._place, self._layout, self._shard = place, layout, shard
        self._max_bytes, self._timeout_s = max_bytes, timeout_s
        self._breaker = _Breaker(place, timeout_s)
        self._used: dict[str, None] = {}
        self._wake = threading.Event()
        self._closed = False
        self._user = threading.Thread(target=self._send_uses, name=f"kvblend-{self.name}-uses", daemon=True)
        self._user.start()

    @property
    def place(self) -> str:
        """The server and what in it; no secrets."""
        return self._place

    @property
    def max_bytes(self) -> int:
        """Bound on the parts of all ranks together."""
        return self._max_bytes

    def put(self, chunk: StoredChunk) -> None:
        """Store a chunk; others may leave for it."""
        key = checked_key(chunk.key)
        parts = encode_chunk(self._layout, chunk, self._shard)
        nbytes = sum(map(len, parts))
        if nbytes > self._max_bytes:
            raise StoreFull(
                f"A chunk file of {nbytes:,} bytes doesn't fit into {self._place} of {self._max_bytes:,}: raise max_gb."
            )
        self._make_room(nbytes)
        self._ask(lambda: self._write(key, self._shard, parts, chunk))

    def read(self, key: str) -> StoredChunk:
        """A chunk, verified; one that is damaged is deleted."""
        checked_key(key)
        data = self._ask(lambda: self._fetch(key, self._shard))
        if data is None:
            raise ChunkMissing(f"Chunk {key} is not in {self._place}: ingest its text again.")
        try:
            chunk = self._decoded(data, key, self._shard)
        except ChunkDamaged:
            with contextlib.suppress(StoreError):
                self.drop([key])
            raise
        self.touch(key)
        return chunk

    def contains(self, key: str) -> bool:
        """Whether this rank's part is there."""
        checked_key(key)
        return self._ask(lambda: self._has(key, self._shard))

    def as_stored(self, chunk: StoredChunk) -> StoredChunk:
        """The chunk as its bytes will give it."""
        return as_stored(self._layout, chunk)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete the parts of all ranks, and leave word of it for the hosts that have copies (``deleted``)."""
        for key in map(checked_key, keys):
            self._ask(lambda key=key: self._bury(key))  # type: ignore[misc]

    def drop(self, keys: Iterable[str]) -> None:
        """Delete the parts of all ranks without a word: copies elsewhere are as good as ever."""
        for key in map(checked_key, keys):
            self._ask(lambda key=key: self._drop(key))  # type: ignore[misc]

    def deleted(self) -> set[str]:
        """Chunks that somebody deleted in the last ``WORD_KEPT_S``; some may have been stored again since."""
        return set(self._buried())

    def touch(self, key: str) -> None:
        """Make a chunk the most recently used, within a second or so; never waits for the server."""
        self._used[key] = None

    def parts(self) -> list[Part]:
        """Every part of every chunk that the server holds."""
        return list(self._pages())

    def token_ids(self, part: Part) -> tuple[str, TokenIds] | None:
        """A chunk's namespace and token ids, int32 of shape (tokens,), without its KV; None: gone, or not its own.

        The key is their digest, so what is returned is right.
        """
        found = self._ask(lambda: self._identify(part)) if self._layout.seal is None else self._unseal(part)
        return found if found is not None and chunk_key(*found) == part.key else None

    def _unseal(self, part: Part) -> tuple[str, TokenIds] | None:
        data = self._ask(lambda: self._fetch(part.key, part.shard))
        try:
            chunk = None if data is None else self._decoded(data, part.key, part.shard)
        except ChunkDamaged:
            return None
        return None if chunk is None else (chunk.namespace, chunk.token_ids)

    def _decoded(self, data: memoryview | bytes, key: str, shard: Shard) -> StoredChunk:
        raw = torch.empty(len(data), dtype=torch.uint8)
        raw.numpy()[:] = np.frombuffer(data, dtype=np.uint8)
        return decode_chunk(self._layout, raw, f"{self._place}: {key}", key, shard)

    def close(self) -> None:
        """Send what is left to send; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self._wake.set()
            self._user.join(self._timeout_s + _USES_EVERY_S)
            self._hang_up()

    def _make_room(self, nbytes: int) -> None:
        """Let what was used longest ago leave; nothing to do for a server that does it while it writes."""

    @abstractmethod
    def _write(self, key: str, shard: Shard, parts: list[memoryview], chunk: StoredChunk) -> None:
        """Store the bytes, whole or not at all."""

    @abstractmethod
    def _fetch(self, key: str, shard: Shard) -> memoryview | bytes | None:
        """The bytes, or None when there are none."""

    @abstractmethod
    def _has(self, key: str, shard: Shard) -> bool: ...

    @abstractmethod
    def _drop(self, key: str) -> None: ...

    @abstractmethod
    def _bury(self, key: str) -> None:
        """As ``_drop``, and leave word of it."""

    @abstractmethod
    def _buried(self) -> Iterator[str]:
        """Keys that word was left of; older word than ``WORD_KEPT_S`` is removed. Calls as in ``_pages``."""

    @abstractmethod
    def _pages(self) -> Iterator[Part]:
        """Every part; each call to the server through ``_ask``."""

    @abstractmethod
    def _identify(self, part: Part) -> tuple[str, TokenIds] | None: ...

    @abstractmethod
    def _use(self, keys: list[str]) -> None:
        """Make chunks the most recently used; those that are gone stay gone."""

    @abstractmethod
    def _explain(self, error: Exception) -> StoreError:
        """What a client's exception means."""

    @abstractmethod
    def _hang_up(self) -> None:
        """Close connections, those that a call still waits on too."""

    def _ask(self, call: Callable[[], T]) -> T:
        with self._breaker:
            try:
                return _within(self._timeout_s, call)
            except TimeoutError:
                self._hang_up()
                raise StoreUnreachable(
                    f"{self._place} did not answer within {self._timeout_s:g} s: check the server, or raise timeout_s."
                ) from None
            except StoreError:
                raise
            except Exception as error:
                explained = self._explain(error)
                if isinstance(explained, StoreUnreachable):
                    self._hang_up()  # what is left of an answer must not be taken for the next
                raise explained from error

    def _send_uses(self) -> None:
        while not self._closed:
            self._wake.wait(_USES_EVERY_S)
            keys = list(self._used)[:_MAX_USES]
            for key in keys:
                self._used.pop(key, None)
            if keys:
                with contextlib.suppress(StoreError):  # it grows old a little early
                    self._ask(lambda keys=keys: self._use(keys))  # type: ignore[misc]


class _Breaker:
    """Lets one call in many through to a server that does not answer, and fails the others at once."""

    def __init__(self, place: str, timeout_s: float) -> None:
        self._place, self._timeout_s = place, timeout_s
        self._until = self._pause = 0.0
        self._why = ""
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            now = time.monotonic()
            if now < self._until:
                raise StoreUnreachable(
                    f"{self._place} is left alone for another {self._until - now:.1f} s, since: {self._why}"
                )
            if self._pause:
                self._until = now + self._timeout_s  # this call tries for all

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with self._lock:
            if isinstance(error, StoreUnreachable):
                self._pause = min(max(_FIRST_PAUSE_S, 2 * self._pause), _LONGEST_PAUSE_S)
                self._until = time.monotonic() + self._pause
                self._why = str(error)
            else:
                self._until = self._pause = 0.0


def _within(seconds: float, call: Callable[[], T]) -> T:
    """The result of a call, in a thread of its own: a client's own timeouts don't bound a server that trickles."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="kvblend-remote", daemon=True).start()
    return future.result(seconds)


__all__ = ["WORD_KEPT_S", "Part", "RemoteStore"]
