"""ValkeyStore: chunks in Valkey or Redis, in the memory of a server that many hosts share.

Every change is one script, so it happens whole or not at all, whoever is killed when. Under a prefix::

    <prefix>:kv:<key>:r0of1    the chunk file of one rank
    <prefix>:meta              hash, by key: namespace and token ids
    <prefix>:shards            hash, by key: the ranks' parts that are there, as "r0of2 r1of2"
    <prefix>:parts             hash, by key:r0of2: bytes
    <prefix>:used              sorted set, by key: the server's time in seconds
    <prefix>:total             bytes in all
    <prefix>:deleted           sorted set, by key: when it was deleted

Keys are made in the scripts, so a cluster needs a prefix in braces, which puts all of it on one node.
The server should have ``maxmemory-policy noeviction``: what leaves is decided here, with all its parts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from kvblend_rag.blend.chunk import TokenIds, as_token_ids
from kvblend_rag.errors import ConfigError, StoreError, StoreFull, StoreUnreachable
from kvblend_rag.store.base import StoredChunk
from kvblend_rag.store.layout import Shard, StoreLayout
from kvblend_rag.store.remote import WORD_KEPT_S, Part, RemoteStore

_COMMON = """
local prefix = KEYS[1]
local function forget(key)
    for shard in string.gmatch(redis.call('HGET', prefix .. ':shards', key) or '', '%S+') do
        redis.call('UNLINK', prefix .. ':kv:' .. key .. ':' .. shard)
        redis.call('DECRBY', prefix .. ':total', redis.call('HGET', prefix .. ':parts', key .. ':' .. shard) or 0)
        redis.call('HDEL', prefix .. ':parts', key .. ':' .. shard)
    end
    redis.call('HDEL', prefix .. ':shards', key)
    redis.call('HDEL', prefix .. ':meta', key)
    redis.call('ZREM', prefix .. ':used', key)
end
local function now()
    local time = redis.call('TIME')
    return time[1] + time[2] / 1000000
end
"""

_WRITE = (
    _COMMON
    + """
local key, shard, bound, data, meta = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]
local part = key .. ':' .. shard
redis.call('SET', prefix .. ':kv:' .. part, data)
redis.call('INCRBY', prefix .. ':total', #data - (redis.call('HGET', prefix .. ':parts', part) or 0))
redis.call('HSET', prefix .. ':parts', part, #data)
redis.call('HSET', prefix .. ':meta', key, meta)
local shards = redis.call('HGET', prefix .. ':shards', key) or ''
if not string.find(' ' .. shards .. ' ', ' ' .. shard .. ' ', 1, true) then
    redis.call('HSET', prefix .. ':shards', key, shards .. ' ' .. shard)
end
redis.call('ZADD', prefix .. ':used', now(), key)
redis.call('ZREM', prefix .. ':deleted', key)
while tonumber(redis.call('GET', prefix .. ':total')) > bound do
    local oldest = redis.call('ZRANGE', prefix .. ':used', 0, 0)[1]
    if oldest == key or not oldest then break end
    forget(oldest)
end
"""
)
_DROP = _COMMON + "for _, key in ipairs(ARGV) do forget(key) end"
_BURY = (
    _COMMON
    + """
for i = 2, #ARGV do
    forget(ARGV[i])
    redis.call('ZADD', prefix .. ':deleted', now(), ARGV[i])
end
redis.call('ZREMRANGEBYSCORE', prefix .. ':deleted', '-inf', now() - tonumber(ARGV[1]))
"""
)
_USE = _COMMON + "for _, key in ipairs(ARGV) do redis.call('ZADD', prefix .. ':used', 'XX', now(), key) end"
_PARTS_A_PAGE = 1_000


class ValkeyStore(RemoteStore):
    """One rank's view of the chunks under a prefix of a Valkey or Redis server, version 7 or later.

    A chunk that was used longest ago leaves, with the parts of all ranks, in the script that needs its room.

    Args:
        url: ``redis://[user:password@]host[:port][/database]``, ``rediss://`` for TLS, ``unix://path``.
        prefix: in front of every key.
        layout: the format that is written and read.
        shard: tensor-parallel (rank, size).
        max_bytes: bound on the parts of all ranks together.
        timeout_s: the longest that any call takes.

    Raises:
        ConfigError: the package ``valkey`` is missing, or the URL can't be used.
    """

    name = "valkey"

    def __init__(
        self, url: str, prefix: str, layout: StoreLayout, *, shard: Shard, max_bytes: int, timeout_s: float
    ) -> None:
        try:
            import valkey
        except ModuleNotFoundError as error:
            raise ConfigError(
                "A Valkey or Redis tier needs the package valkey: pip install 'kvblend-rag[valkey]'."
            ) from error
        self._errors = valkey.exceptions
        self._prefix = prefix
        plain = re.sub(r"^redis", "valkey", url) if url.startswith("redis") else url
        try:
            self._client: Any = valkey.Valkey.from_url(
                plain, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=None, retry_on_timeout=False
            )
        except ValueError as error:
            raise ConfigError(f"The address of a Valkey or Redis tier can't be used: {error}.") from error
        self._run = {source: self._client.register_script(source) for source in (_WRITE, _DROP, _BURY, _USE)}
        super().__init__(re.sub(r"//[^@/]*@", "//", url), layout, shard, max_bytes, timeout_s)

    def nbytes(self) -> int:
        """Bytes in chunks of all ranks and hosts."""
        return int(self._ask(lambda: self._client.get(f"{self._prefix}:total")) or 0)

    def _write(self, key: str, shard: Shard, parts: list[memoryview], chunk: StoredChunk) -> None:
        token_ids = b"" if self._layout.seal else as_token_ids(chunk.token_ids).tobytes()
        meta = json.dumps({"namespace": chunk.namespace}).encode() + b"\n" + token_ids
        self._script(_WRITE, key, _name(shard), self._max_bytes, b"".join(parts), meta)

    def _fetch(self, key: str, shard: Shard) -> bytes | None:
        data: bytes | None = self._client.get(self._key(key, shard))
        return data

    def _has(self, key: str, shard: Shard) -> bool:
        return bool(self._client.exists(self._key(key, shard)))

    def _drop(self, key: str) -> None:
        self._script(_DROP, key)

    def _bury(self, key: str) -> None:
        self._script(_BURY, WORD_KEPT_S, key)

    def _buried(self) -> Iterator[str]:
        cursor = 0
        while True:
            cursor, page = self._ask(
                lambda: self._client.zscan(f"{self._prefix}:deleted", cursor, count=_PARTS_A_PAGE)  # noqa: B023
            )
            yield from (key.decode() for key, _ in page)
            if not cursor:
                return

    def _pages(self) -> Iterator[Part]:
        cursor = 0
        while True:
            cursor, page = self._ask(
                lambda: self._client.hscan(f"{self._prefix}:parts", cursor, count=_PARTS_A_PAGE)  # noqa: B023
            )
            for name, nbytes in page.items():
                key, _, shard = name.decode().partition(":r")
                rank, _, size = shard.partition("of")
                yield Part(key, (int(rank), int(size)), int(nbytes))
            if not cursor:
                return

    def _identify(self, part: Part) -> tuple[str, TokenIds] | None:
        meta: bytes | None = self._client.hget(f"{self._prefix}:meta", part.key)
        if meta is None:
            return None
        head, _, blob = meta.partition(b"\n")
        return json.loads(head)["namespace"], np.frombuffer(blob, dtype="<i4")

    def _use(self, keys: list[str]) -> None:
        self._script(_USE, *keys)

    def _explain(self, error: Exception) -> StoreError:
        if isinstance(error, self._errors.OutOfMemoryError):
            return StoreFull(f"{self._place} has no memory left: raise its maxmemory above max_gb.")
        if isinstance(error, self._errors.ResponseError):
            return StoreUnreachable(f"{self._place} refused a command ({error}): check its version and permissions.")
        return StoreUnreachable(f"{self._place} can't be reached ({error}): check the server and the address.")

    def _hang_up(self) -> None:
        self._client.connection_pool.disconnect()

    def _script(self, source: str, *arguments: Any) -> None:
        self._run[source](keys=[self._prefix], args=arguments)

    def _key(self, key: str, shard: Shard) -> str:
        return f"{self._prefix}:kv:{key}:{_name(shard)}"


def _name(shard: Shard) -> str:
    return f"r{shard[0]}of{shard[1]}"


__all__ = ["ValkeyStore"]
