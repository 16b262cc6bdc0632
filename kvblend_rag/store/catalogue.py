"""Catalogue: which chunks the store holds whole, their token ids, and which documents want them.

One SQLite file, written by any number of processes and threads. It knows keys and token ids and never
opens a tensor. Three rules keep it true:

- files before rows: a row is added after its tensors are durable, and removed before they go;
- the journal before the commit: what documents hold is written down beside the catalogue too, and a new
  catalogue begins with it;
- holds before rows: a document holds its keys before it asks which are ``missing``, so that a release
  elsewhere can't take them away in between.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kvblend_rag.blend.chunk import TokenIds
from kvblend_rag.store import tables
from kvblend_rag.store.database import Database
from kvblend_rag.store.journal import Journal
from kvblend_rag.store.layout import StoreLayout
from kvblend_rag.store.tables import ANONYMOUS, ChunkRow


class Document(NamedTuple):
    """A document and the number of chunks it holds."""

    tenant: str
    document_id: str
    chunks: int


@dataclass(frozen=True)
class Changes:
    """What became visible and what went, in one namespace since a cursor."""

    added: list[tuple[str, TokenIds]]
    """Key and token ids, int32, shape (tokens,)."""
    removed: list[str]
    cursor: int
    """To be passed to the next call."""
    reset: bool
    """Removals since the cursor are no longer on record: forget what is known, ``added`` is all of it."""


class Catalogue:
    """The catalogue of the store at ``root``; opening it creates what is missing.

    Raises (every method):
        StoreFull: no space is left.
        StoreError: the file is damaged, can't be written, or stays locked by another process.
    """

    def __init__(self, root: str | Path | StoreLayout) -> None:
        layout = StoreLayout.of(root)
        layout.create()
        self._seal = layout.seal
        self._database = Database(layout, tables.SCHEMA, tables.VERSION)
        self._journal = Journal(layout)
        self._seen: int | None = None
        if not self._journal.exists():  # a new store, or one of an older release
            self.tidy_journal()
        elif self._database.fresh:
            self._restore_holds()

    def add(self, key: str, namespace: str, token_ids: TokenIds, rank: int, shard_count: int, nbytes: int) -> None:
        """Register a rank's part of a chunk, whose file is durable; the last rank makes it visible."""
        self.add_rows([ChunkRow(key, namespace, token_ids, rank, shard_count, nbytes)])

    def add_rows(self, rows: Iterable[ChunkRow]) -> None:
        """``add`` for many, in one transaction."""
        with self._database.writing() as sql:
            for row in rows:
                tables.add(sql, row, self._seal)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys, in their order, that aren't registered by all their ranks."""
        keys = list(dict.fromkeys(keys))
        with self._database.reading() as sql:
            found = sql.execute(f"SELECT key FROM chunk WHERE complete AND {tables.AMONG}", (json.dumps(keys),))
            present = {key for (key,) in found}
        return [key for key in keys if key not in present]

    def among(self, keys: Iterable[str], namespace: str) -> list[str]:
        """Those of the keys, in their order, that are registered by all their ranks in a namespace."""
        keys = list(dict.fromkeys(keys))
        with self._database.reading() as sql:
            query = f"SELECT key FROM chunk WHERE complete AND namespace = ? AND {tables.AMONG}"
            present = {key for (key,) in sql.execute(query, (namespace, json.dumps(keys)))}
        return [key for key in keys if key in present]

    def remove(self, keys: Iterable[str], unless_held: bool = False) -> list[str]:
        """Drop the rows of chunks, before their files go; returns the keys that have no row now.

        Args:
            keys: unknown ones are passed over.
            unless_held: leave those that a document holds.
        """
        keys = list(dict.fromkeys(keys))
        with self._database.writing() as sql:
            if unless_held:
                keys = tables.without_holder(sql, keys)
            sql.execute(
                f"DELETE FROM document WHERE document_id = ? AND {tables.AMONG}",
                (ANONYMOUS, json.dumps(keys)),
            )
            tables.forget(sql, keys)
        return keys

    def hold(self, document_id: str, keys: Iterable[str], tenant: str = "") -> None:
        """Let a document hold further chunks, stored or about to be; ``ANONYMOUS`` holds for nobody."""
        self.hold_all({document_id: keys}, tenant)

    def hold_all(self, documents: Mapping[str, Iterable[str]], tenant: str = "") -> None:
        """``hold`` for many documents, in one transaction."""
        with self._database.writing() as sql:
            fresh = [(each, tables.hold(sql, tenant, each, keys)) for each, keys in documents.items()]
            self._journal.append(*(["hold", tenant, each, keys] for each, keys in fresh if keys and each != ANONYMOUS))

    def replace_holds(self, document_id: str, keys: Iterable[str], tenant: str = "") -> list[str]:
        """Let an edited document hold exactly these chunks; returns the keys nobody holds any more."""
        return self.settle({document_id: keys}, (), tenant)

    def release(self, document_id: str, tenant: str = "") -> list[str]:
        """Forget a document; returns the keys nobody holds any more (``ChunkStore.delete_unheld``)."""
        return self.settle({}, (document_id,), tenant)

    def settle(self, edited: Mapping[str, Iterable[str]], gone: Iterable[str], tenant: str = "") -> list[str]:
        """``replace_holds`` and ``release`` for many documents, in one transaction.

        Args:
            edited: what each document holds from now on.
            gone: documents to forget.
            tenant: whose they are.
        """
        freed: list[str] = []
        records: list[list[Any]] = []
        with self._database.writing() as sql:
            for document_id in gone:
                tables.leave(sql, tenant, document_id)
                freed += tables.let_go(sql, tenant, document_id)
                if document_id != ANONYMOUS:
                    records += [["leave", tenant, document_id], ["let_go", tenant, document_id]]
            for document_id, keys in edited.items():
                before = tables.let_go(sql, tenant, document_id)
                now = tables.hold(sql, tenant, document_id, keys)
                freed += before
                if set(before) != set(now) and document_id != ANONYMOUS:
                    records += [["let_go", tenant, document_id], ["hold", tenant, document_id, now]]
            self._journal.append(*records)
            return tables.without_holder(sql, list(dict.fromkeys(freed)))

    def join(self, groups: Iterable[tuple[str, str]], tenant: str = "") -> None:
        """Let documents be members of groups, given as (group, document), until they are released."""
        groups = list(groups)
        with self._database.writing() as sql:
            tables.join(sql, tenant, groups)
            self._journal.append(["join", tenant, groups])

    def tidy_journal(self) -> int:
        """Write the journal anew, as short as it can be; returns how many of its lines were damaged."""
        with self._database.writing() as sql:
            damaged = self._journal.read().damaged
            self._journal.rewrite(tables.holds(sql).records())
        return damaged

    def damaged_journal_lines(self) -> int:
        """How many lines of the journal are not what was written."""
        return self._journal.read().damaged

    def members(self, group: str, tenant: str = "") -> list[str]:
        """The documents of a group."""
        with self._database.reading() as sql:
            rows = sql.execute("SELECT document_id FROM member WHERE tenant = ? AND group_id = ?", (tenant, group))
            return [document_id for (document_id,) in rows]

    def all_members(self, prefix: str, tenant: str = "") -> list[str]:
        """The documents of every group whose name begins with ``prefix``."""
        with self._database.reading() as sql:
            rows = sql.execute(
                "SELECT DISTINCT document_id FROM member WHERE tenant = ? AND substr(group_id, 1, ?) = ?",
                (tenant, len(prefix), prefix),
            )
            return [document_id for (document_id,) in rows]

    def chunks_of(self, document_ids: Iterable[str], tenant: str = "") -> dict[str, list[str]]:
        """The keys that documents hold, by document; nothing for those that hold none."""
        found: dict[str, list[str]] = {}
        with self._database.reading() as sql:
            rows = sql.execute(
                "SELECT document_id, key FROM document WHERE tenant = ? AND document_id <> ?"
                " AND document_id IN (SELECT value FROM json_each(?))",
                (tenant, ANONYMOUS, json.dumps(list(document_ids))),
            )
            for document_id, key in rows:
                found.setdefault(document_id, []).append(key)
        return found

    def put_off(self, keys: Iterable[str]) -> None:
        """Put on record that chunks are still to be deleted in a remote tier (``due``)."""
        with self._database.writing() as sql:
            sql.executemany("INSERT OR IGNORE INTO due VALUES (?)", [(key,) for key in keys])

    def due(self) -> list[str]:
        """Chunks whose deletion was put off, and that have not been stored again since."""
        with self._database.reading() as sql:
            rows = sql.execute("SELECT key FROM due WHERE key NOT IN (SELECT key FROM chunk)")
            return [key for (key,) in rows]

    def made_up_for(self, keys: Iterable[str]) -> None:
        """What was put off is done; what was stored again since needs no deletion any more."""
        among = (json.dumps(list(keys)),)
        with self._database.writing() as sql:
            sql.execute(f"DELETE FROM due WHERE {tables.AMONG} OR key IN (SELECT key FROM chunk)", among)

    def held(self, keys: Iterable[str], anonymously: bool = True) -> set[str]:
        """Those of the keys that some document holds; an anonymous one too, unless told otherwise."""
        with self._database.reading() as sql:
            return tables.held(sql, list(keys), anonymously)

    def unheld(self) -> list[str]:
        """Chunks with a row that no document holds."""
        with self._database.reading() as sql:
            rows = sql.execute("SELECT key FROM chunk WHERE key NOT IN (SELECT key FROM document)")
            return [key for (key,) in rows]

    def documents(self) -> list[Document]:
        """Every document but the anonymous ones."""
        with self._database.reading() as sql:
            rows = sql.execute(
                "SELECT tenant, document_id, count(*) FROM document WHERE document_id <> ? GROUP BY 1, 2",
                (ANONYMOUS,),
            )
            return [Document(*row) for row in rows]

    def rows(self) -> list[ChunkRow]:
        """Every registration, complete or not; the token ids of a damaged row are empty."""
        with self._database.reading() as sql:
            rows = sql.execute(
                "SELECT key, namespace, token_ids, rank, shard_count, nbytes, checksum"
                " FROM chunk JOIN shard USING (key)"
            )
            return [
                ChunkRow(
                    key, space, tables.token_ids(key, space, blob, checksum, self._seal), rank, shard_count, nbytes
                )
                for key, space, blob, rank, shard_count, nbytes, checksum in rows
            ]

    def changes_since(self, cursor: int, namespace: str) -> Changes:
        """What to do to what was known at ``cursor`` (0: nothing) to know what is visible now.

        Rows that fail their checksum are left out. A key is in at most one of the lists.
        """
        version = self._database.version()  # before reading: what comes in between is seen twice, not never
        with self._database.reading() as sql:
            (newest,) = sql.execute("SELECT coalesce(max(id), 0) FROM change").fetchone()
            (horizon,) = sql.execute("SELECT coalesce(max(id), 0) FROM forgotten").fetchone()
            # a cursor from the future was taken before the catalogue was made anew
            reset = 0 < cursor < horizon or cursor > newest
            rows = sql.execute(
                "SELECT key, present, token_ids, checksum FROM change LEFT JOIN chunk USING (key)"
                " WHERE change.namespace = ? AND id > ? ORDER BY id",
                (namespace, 0 if reset else cursor),
            ).fetchall()
        self._seen = version
        read = (
            (key, tables.token_ids(key, namespace, blob, checksum, self._seal))
            for key, present, blob, checksum in rows
            if present
        )
        return Changes(
            added=[(key, token_ids) for key, token_ids in read if token_ids.size],
            removed=[key for key, present, *_ in rows if not present] if cursor and not reset else [],
            cursor=newest,
            reset=reset,
        )

    def newest(self, namespace: str, count: int) -> dict[str, TokenIds]:
        """Token ids of a namespace's visible chunks by key, so many at most, the newest first; no damaged rows."""
        with self._database.reading() as sql:
            rows = sql.execute(
                "SELECT key, token_ids, checksum FROM change JOIN chunk USING (key)"
                " WHERE change.namespace = ? AND present ORDER BY id DESC LIMIT ?",
                (namespace, count),
            ).fetchall()
        read = {key: tables.token_ids(key, namespace, blob, checksum, self._seal) for key, blob, checksum in rows}
        return {key: token_ids for key, token_ids in read.items() if token_ids.size}

    def sample(self, count: int) -> list[str]:
        """Keys of visible chunks, so many at most; whichever come first."""
        with self._database.reading() as sql:
            return [key for (key,) in sql.execute("SELECT key FROM chunk WHERE complete LIMIT ?", (count,))]

    def changed(self) -> bool:
        """Whether anybody committed since this object's last ``changes_since``; takes some 5 µs."""
        return self._database.version() != self._seen

    def stats(self) -> dict[str, int]:
        """Visible ``chunks``, their ``tokens`` and ``bytes``; ``namespaces``, ``documents``."""
        with self._database.reading() as sql:
            chunks, tokens, namespaces = sql.execute(
                f"SELECT count(*), coalesce(sum({tables.TOKEN_BYTES}), 0) / 4, count(DISTINCT namespace)"
                " FROM chunk WHERE complete"
            ).fetchone()
            (nbytes,) = sql.execute(
                "SELECT coalesce(sum(nbytes), 0) FROM shard JOIN chunk USING (key) WHERE complete"
            ).fetchone()
            (documents,) = sql.execute(
                "SELECT count(*) FROM (SELECT DISTINCT tenant, document_id FROM document WHERE document_id <> ?)",
                (ANONYMOUS,),
            ).fetchone()
        return {
            "chunks": chunks,
            "tokens": tokens,
            "bytes": nbytes,
            "namespaces": namespaces,
            "documents": documents,
        }

    def verify(self) -> None:
        """Read the whole file; raises ``StoreError`` when it is damaged."""
        self._database.verify()

    def _restore_holds(self) -> None:
        holds = self._journal.read()
        with self._database.writing() as sql:
            for (tenant, document_id), keys in holds.documents.items():
                tables.hold(sql, tenant, document_id, keys)
            for tenant, group, document_id in holds.members:
                tables.join(sql, tenant, [(group, document_id)])

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._database.close()


__all__ = ["ANONYMOUS", "Catalogue", "Changes", "ChunkRow", "Document"]
