"""S3Store: chunks in an S3-compatible object store, through obstore.

An object appears whole or not at all, so a writer may be killed at any instant. Under a prefix::

    chunks/ab/<key>.r0of1.safetensors    one chunk, one rank's heads
    used/<key>                           empty; its time is the chunk's latest use, renewed once an hour
    deleted/<key>                        empty; its time is that of the deletion

The times of both are the server's, so hosts need not agree on theirs. What another host writes counts
once it is listed: between listings, several hosts together may pass the bound by what they wrote.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np

from kvblend_rag.blend.chunk import TokenIds
from kvblend_rag.errors import ConfigError, StoreError, StoreUnreachable
from kvblend_rag.store.base import StoredChunk
from kvblend_rag.store.layout import Shard, StoreLayout
from kvblend_rag.store.remote import WORD_KEPT_S, Part, RemoteStore

_A_PAGE = 1_000
_HEADER = 2_048
_LIST_EVERY_S = 300.0
_MARK_EVERY_S = 3_600.0
_KEEP = 0.95
"""Share of the bound that stays when it is passed, so that the next chunks need no listing."""


class S3Store(RemoteStore):
    """One rank's view of the chunks under a prefix of a bucket.

    Credentials, and the region and endpoint when not given, come from the ``AWS_*`` variables or the
    machine's role.

    Args:
        bucket: must exist.
        prefix: in front of every object's name.
        layout: the format that is written and read.
        shard: tensor-parallel (rank, size).
        max_bytes: bound on the parts of all ranks together.
        timeout_s: the longest that any call takes.
        endpoint: ``https://host[:port]`` of a server that is not Amazon's; ``http://`` is allowed.
        region: as the server wants it.

    Raises:
        ConfigError: the package ``obstore`` is missing, or the settings can't be used.
    """

    name = "s3"

    def __init__(
        self,
        bucket: str,
        prefix: str,
        layout: StoreLayout,
        *,
        shard: Shard,
        max_bytes: int,
        timeout_s: float,
        endpoint: str | None = None,
        region: str | None = None,
    ) -> None:
        try:
            from obstore.exceptions import BaseError
            from obstore.store import S3Store as Client
        except ModuleNotFoundError as error:
            raise ConfigError("An S3 tier needs the package obstore: pip install 'kvblend-rag[s3]'.") from error
        given: dict[str, Any] = {"endpoint": endpoint, "region": region}
        limit = timedelta(seconds=timeout_s)
        try:
            self._client = Client(
                bucket,
                prefix=prefix or None,
                client_options={"allow_http": True, "timeout": limit, "connect_timeout": limit},
                retry_config={"max_retries": 2, "retry_timeout": limit},
                **{name: value for name, value in given.items() if value},
            )
        except BaseError as error:
            raise ConfigError(f"The S3 tier s3://{bucket}/{prefix} can't be used: {error}") from error
        self._room_lock = threading.Lock()
        self._known_total = 0
        self._listed = -_LIST_EVERY_S
        self._marked: dict[str, float] = {}
        super().__init__(f"s3://{bucket}/{prefix}", layout, shard, max_bytes, timeout_s)

    def nbytes(self) -> int:
        """Bytes in chunks of all ranks and hosts, listed now."""
        return sum(part.nbytes for part in self._pages())

    def _make_room(self, nbytes: int) -> None:
        with self._room_lock:
            if self._known_total + nbytes > self._max_bytes or time.monotonic() > self._listed + _LIST_EVERY_S:
                self._evict(nbytes)
            self._known_total += nbytes

    def _evict(self, room: int) -> None:
        sizes: dict[str, int] = {}
        used: dict[str, float] = {}
        for name, nbytes, when in self._list("chunks"):
            part = self._part(name, nbytes)
            if part is not None:
                sizes[part.key] = sizes.get(part.key, 0) + nbytes
                used[part.key] = max(used.get(part.key, 0.0), when)
        total = sum(sizes.values())
        if total + room > self._max_bytes:
            for name, _, when in self._list("used"):
                key = name.rpartition("/")[2]
                if key in used:
                    used[key] = max(used[key], when)
                else:
                    self._ask(lambda name=name: self._client.delete(name))  # type: ignore[misc]
            for key in sorted(used, key=used.__getitem__):
                if total <= min(_KEEP * self._max_bytes, self._max_bytes - room):
                    break
                self.drop([key])
                total -= sizes[key]
        self._known_total, self._listed = total, time.monotonic()

    def _write(self, key: str, shard: Shard, parts: list[memoryview], chunk: StoredChunk) -> None:
        # one request, so that a killed writer leaves no unfinished upload that is paid for
        self._client.put(self._object(key, shard), b"".join(parts), use_multipart=False)

    def _fetch(self, key: str, shard: Shard) -> memoryview | None:
        try:
            return memoryview(self._client.get(self._object(key, shard)).bytes())
        except FileNotFoundError:
            return None

    def _has(self, key: str, shard: Shard) -> bool:
        try:
            self._client.head(self._object(key, shard))
        except FileNotFoundError:
            return False
        return True

    def _drop(self, key: str) -> None:
        folder = f"chunks/{key[:2]}/{key}"
        names = [each["path"] for page in self._client.list(f"chunks/{key[:2]}") for each in page]
        # object_store lists by whole path segments, so the key's own objects are picked here
        for name in [*(name for name in names if name.startswith(folder)), f"used/{key}"]:
            with contextlib.suppress(FileNotFoundError):
                self._client.delete(name)
        self._marked.pop(key, None)

    def _bury(self, key: str) -> None:
        # word first: who is killed in between has deleted nothing, and a chunk that is there outweighs the word
        self._client.put(f"deleted/{key}", b"", use_multipart=False)
        self._drop(key)

    def _buried(self) -> Iterator[str]:
        for name, _, when in self._list("deleted"):
            if when > time.time() - WORD_KEPT_S:
                yield name.rpartition("/")[2]
            else:
                with contextlib.suppress(FileNotFoundError):
                    self._ask(lambda name=name: self._client.delete(name))  # type: ignore[misc]

    def _pages(self) -> Iterator[Part]:
        for name, nbytes, _ in self._list("chunks"):
            part = self._part(name, nbytes)
            if part is not None:
                yield part

    def _identify(self, part: Part) -> tuple[str, TokenIds] | None:
        name = self._object(part.key, part.shard)
        try:
            head = memoryview(self._client.get_range(name, start=0, length=min(_HEADER, part.nbytes)))
            start = 8 + int.from_bytes(head[:8], "little")
            header = json.loads(bytes(head[8:start]))
            first, last = header["token_ids"]["data_offsets"]
            blob = self._client.get_range(name, start=start + first, end=start + last)
            return str(header["__metadata__"]["namespace"]), np.frombuffer(memoryview(blob), dtype="<i4")
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None  # gone, or no chunk file

    def _use(self, keys: list[str]) -> None:
        now = time.monotonic()
        for key in keys:
            if now - self._marked.get(key, -_MARK_EVERY_S) >= _MARK_EVERY_S:
                self._client.put(f"used/{key}", b"", use_multipart=False)
                self._marked[key] = now

    def _explain(self, error: Exception) -> StoreError:
        text = " ".join(str(error).split())[:300]
        return StoreUnreachable(f"{self._place} can't be reached ({text}): check endpoint, bucket and credentials.")

    def _hang_up(self) -> None:
        """Each request has its own deadline, and ends by itself."""

    def _list(self, folder: str) -> Iterator[tuple[str, int, float]]:
        stream = self._client.list(folder, chunk_size=_A_PAGE)
        while page := self._ask(lambda: next(stream, None)):
            yield from ((each["path"], each["size"], each["last_modified"].timestamp()) for each in page)

    def _part(self, name: str, nbytes: int) -> Part | None:
        file = self._layout.parse(name.rpartition("/")[2])
        return None if file is None else Part(file.key, file.shard, nbytes)

    def _object(self, key: str, shard: Shard) -> str:
        return self._layout.chunk_path(key, shard).relative_to(self._layout.root).as_posix()


__all__ = ["S3Store"]
