"""The catalogue's tables, and what may be done to them inside a transaction."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from kvblend_rag.blend.chunk import TokenIds, as_token_ids
from kvblend_rag.errors import StoreError
from kvblend_rag.store.journal import Holds
from kvblend_rag.store.layout import checked_key
from kvblend_rag.store.seal import Seal

ANONYMOUS = ""
"""The document that holds chunks ingested without a document id."""

VERSION = 3
"""2: groups of documents. 3: deletions that are due."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS chunk(
    key TEXT PRIMARY KEY, namespace TEXT NOT NULL, token_ids BLOB NOT NULL, shard_count INTEGER NOT NULL,
    complete INTEGER NOT NULL DEFAULT 0, checksum BLOB NOT NULL, created REAL NOT NULL);
CREATE TABLE IF NOT EXISTS shard(
    key TEXT NOT NULL, rank INTEGER NOT NULL, nbytes INTEGER NOT NULL, PRIMARY KEY(key, rank)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS document(
    tenant TEXT NOT NULL, document_id TEXT NOT NULL, key TEXT NOT NULL,
    PRIMARY KEY(tenant, document_id, key)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS document_key ON document(key);
CREATE TABLE IF NOT EXISTS member(
    tenant TEXT NOT NULL, group_id TEXT NOT NULL, document_id TEXT NOT NULL,
    PRIMARY KEY(tenant, group_id, document_id)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS member_document ON member(tenant, document_id);
-- the newest change of each key; ids only grow, so whoever knows an id can follow from there
CREATE TABLE IF NOT EXISTS change(
    id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, namespace TEXT NOT NULL,
    present INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS change_namespace ON change(namespace, id);
CREATE INDEX IF NOT EXISTS change_removed ON change(id) WHERE NOT present;
CREATE TABLE IF NOT EXISTS forgotten(id INTEGER NOT NULL);
-- chunks whose deletion a remote tier has not heard of yet
CREATE TABLE IF NOT EXISTS due(key TEXT PRIMARY KEY) WITHOUT ROWID;
"""
AMONG = "key IN (SELECT value FROM json_each(?))"
_SEALED = b"\x01"
"""In front of what is sealed, whose length is then no multiple of a token's."""
TOKEN_BYTES = "length(token_ids) - CASE length(token_ids) % 4 WHEN 1 THEN 29 ELSE 0 END"
_REMOVALS_KEPT = 100_000


class ChunkRow(NamedTuple):
    """One rank's registration of a chunk, and all that is known of it."""

    key: str
    namespace: str
    token_ids: TokenIds
    rank: int
    shard_count: int
    nbytes: int


def add(sql: sqlite3.Connection, row: ChunkRow, seal: Seal | None) -> None:
    """Register a rank's part of a chunk, its token ids sealed; the last of its ranks makes it visible."""
    if not 0 <= row.rank < row.shard_count or not len(row.token_ids):
        raise StoreError(
            f"Chunk {row.key} can't be listed as rank {row.rank} of {row.shard_count} with {len(row.token_ids)} tokens."
        )
    blob = as_token_ids(row.token_ids).tobytes()
    checksum = _checksum(row.key, row.namespace, blob)
    known = sql.execute("SELECT shard_count, checksum FROM chunk WHERE key = ?", (row.key,)).fetchone()
    if known is not None and known != (row.shard_count, checksum):
        forget(sql, [row.key])  # written by another number of ranks, whose parts don't fit ours
    sql.execute(
        "INSERT OR IGNORE INTO chunk(key, namespace, token_ids, shard_count, checksum, created)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        (checked_key(row.key), row.namespace, _sealed(row, blob, seal), row.shard_count, checksum, time.time()),
    )
    sql.execute("INSERT OR REPLACE INTO shard VALUES (?, ?, ?)", (row.key, row.rank, row.nbytes))
    completed = sql.execute(
        "UPDATE chunk SET complete = 1 WHERE key = ? AND NOT complete"
        " AND shard_count = (SELECT count(*) FROM shard WHERE key = ?)",
        (row.key, row.key),
    )
    if completed.rowcount:
        sql.execute(
            "INSERT OR REPLACE INTO change(key, namespace, present) VALUES (?, ?, 1)",
            (row.key, row.namespace),
        )


def forget(sql: sqlite3.Connection, keys: list[str]) -> None:
    """Drop chunks whole, and put the visible ones on record as removed."""
    among = (json.dumps(keys),)
    sql.execute(
        "INSERT OR REPLACE INTO change(key, namespace, present)"
        f" SELECT key, namespace, 0 FROM chunk WHERE complete AND {AMONG}",
        among,
    )
    sql.execute(f"DELETE FROM shard WHERE {AMONG}", among)
    sql.execute(f"DELETE FROM chunk WHERE {AMONG}", among)
    # a store that evicts all day would grow by its removals, so the oldest leave the record
    (horizon,) = sql.execute("SELECT coalesce(max(id), 0) - ? FROM change", (_REMOVALS_KEPT,)).fetchone()
    if sql.execute("DELETE FROM change WHERE NOT present AND id <= ?", (horizon,)).rowcount:
        sql.execute("DELETE FROM forgotten")
        sql.execute("INSERT INTO forgotten VALUES (?)", (horizon,))


def hold(sql: sqlite3.Connection, tenant: str, document_id: str, keys: Iterable[str]) -> list[str]:
    """Let a document hold further keys; returns those it did not hold yet."""
    document = (tenant, document_id)
    already = {key for (key,) in sql.execute("SELECT key FROM document WHERE tenant = ? AND document_id = ?", document)}
    fresh = [key for key in dict.fromkeys(map(checked_key, keys)) if key not in already]
    sql.executemany("INSERT INTO document VALUES (?, ?, ?)", [(*document, key) for key in fresh])
    return fresh


def let_go(sql: sqlite3.Connection, tenant: str, document_id: str) -> list[str]:
    """Forget a document; returns what it held."""
    document = (tenant, document_id)
    rows = sql.execute("SELECT key FROM document WHERE tenant = ? AND document_id = ?", document).fetchall()
    sql.execute("DELETE FROM document WHERE tenant = ? AND document_id = ?", document)
    return [key for (key,) in rows]


def join(sql: sqlite3.Connection, tenant: str, groups: Iterable[tuple[str, str]]) -> None:
    """Let documents be members of groups, given as (group, document)."""
    sql.executemany("INSERT OR IGNORE INTO member VALUES (?, ?, ?)", [(tenant, *pair) for pair in groups])


def leave(sql: sqlite3.Connection, tenant: str, document_id: str) -> None:
    """Let a document be a member of no group."""
    sql.execute("DELETE FROM member WHERE tenant = ? AND document_id = ?", (tenant, document_id))


def holds(sql: sqlite3.Connection) -> Holds:
    """What every document but the anonymous ones holds, and the groups."""
    found = Holds(members=set(sql.execute("SELECT tenant, group_id, document_id FROM member")))
    rows = sql.execute("SELECT tenant, document_id, key FROM document WHERE document_id <> ?", (ANONYMOUS,))
    for tenant, document_id, key in rows:
        found.documents.setdefault((tenant, document_id), set()).add(key)
    return found


def held(sql: sqlite3.Connection, keys: list[str], anonymously: bool = True) -> set[str]:
    """Those of the keys that some document holds; an anonymous one too, unless told otherwise."""
    among = f"SELECT DISTINCT key FROM document WHERE {AMONG}" + ("" if anonymously else " AND document_id <> ''")
    rows = sql.execute(among, (json.dumps(keys),))
    return {key for (key,) in rows}


def without_holder(sql: sqlite3.Connection, keys: list[str]) -> list[str]:
    """Those of the keys, in their order, that no document holds."""
    kept = held(sql, keys)
    return [key for key in keys if key not in kept]


def _checksum(key: str, namespace: str, blob: bytes) -> bytes:
    # SQLite has none of its own, and one flipped token would match a prompt the KV doesn't belong to
    return hashlib.blake2b(f"{key} {namespace} ".encode() + blob, digest_size=8).digest()


def token_ids(key: str, namespace: str, blob: bytes, checksum: bytes, seal: Seal | None) -> TokenIds:
    """A row's token ids, int32, shape (tokens,); empty when the row fails its checksum or was not sealed by us."""
    opened: bytes | None = blob
    if seal is not None:
        opened = seal.open(memoryview(blob)[1:], key.encode()) if blob[:1] == _SEALED else None
    sound = opened is not None and _checksum(key, namespace, opened) == checksum
    return np.frombuffer(opened if sound and opened else b"", dtype=np.int32)


def _sealed(row: ChunkRow, blob: bytes, seal: Seal | None) -> bytes:
    return blob if seal is None else _SEALED + seal.seal(blob, row.key.encode())


__all__ = [
    "AMONG",
    "ANONYMOUS",
    "SCHEMA",
    "TOKEN_BYTES",
    "VERSION",
    "ChunkRow",
    "add",
    "forget",
    "held",
    "hold",
    "holds",
    "join",
    "leave",
    "let_go",
    "token_ids",
    "without_holder",
]
