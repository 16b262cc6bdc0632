"""ServedDocuments: ingest, deletion and prefetch on a server; and what its catalogue is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

from tqdm.auto import tqdm

from kvblend_rag.client.connection import Connection
from kvblend_rag.errors import StoreError, StoreFull
from kvblend_rag.ingest import Documents, IngestReport, Text

_AT_ONCE = 1000
"""Documents a job."""

_LOOK_S = (0.05, 0.1, 0.2, 0.5)
"""Pauses between two looks at a job; the last again and again."""


class ServedDocuments(Documents):
    """The routes of one server.

    Args:
        connection: to it.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.catalogue = ServedCatalogue(connection)

    async def ingest(
        self, texts: Sequence[Text], ids: Sequence[str] | None, tenant: str, *, replace: bool, progress: bool
    ) -> IngestReport:
        """See :meth:`Documents.ingest`."""
        named = ids if ids is not None else ["kvblend:unnamed"] * len(texts)
        documents = [_document(text, name) for text, name in zip(texts, named, strict=True)]
        made = []
        with tqdm(total=len(documents), desc="Precomputing KV", unit="doc", disable=not progress) as bar:
            for part in _parts(documents):
                body = {"documents": part, "tenant": tenant, "replace": replace and ids is not None}
                made.append(await self._watched(await self._connection.apost("/documents", body), bar))
        skipped = [each for job in made for each in job["skipped"]]
        places = {name: place for place, name in reversed(list(enumerate(named)))}
        return IngestReport(
            **{name: sum(job[name] for job in made) for name in ("chunks", "computed", "present", "tokens", "seconds")},
            skipped=tuple((places[each["id"]], each["reason"]) for each in skipped),
        )

    async def release(self, ids: Sequence[str], tenant: str) -> int:
        """See :meth:`Documents.release`."""
        gone = 0
        for start in range(0, len(ids), _AT_ONCE):
            body = {"ids": list(ids[start : start + _AT_ONCE]), "tenant": tenant}
            gone += (await self._connection.apost("/documents/delete", body))["chunks"]
        return gone

    async def prefetch(self, texts: Sequence[Text], ids: Sequence[str], chunks: Sequence[str], tenant: str) -> int:
        """See :meth:`Documents.prefetch`."""
        body = {"texts": [each for each in texts if isinstance(each, str)], "documents": list(ids)}
        answer = await self._connection.apost("/prefetch", {**body, "chunks": list(chunks), "tenant": tenant})
        return int(answer["chunks"])

    async def _watched(self, job: dict[str, Any], bar: tqdm[Any]) -> dict[str, Any]:
        """The job when it is done."""
        pauses = iter(_LOOK_S)
        try:
            while job["state"] in ("waiting", "running"):
                await asyncio.sleep(next(pauses, _LOOK_S[-1]))
                before = job["documents_done"]
                job = await self._connection.aget(f"/jobs/{job['id']}")
                bar.update(job["documents_done"] - before)
        except asyncio.CancelledError:
            await asyncio.shield(self._connection.client.delete(f"/kvblend/jobs/{job['id']}", cast_to=object))
            raise
        if job["state"] != "done":
            reason = job["error"] or "the job was cancelled on the server."
            raise (StoreFull if "space" in reason else StoreError)(f"The server did not store everything: {reason}")
        return job


class ServedCatalogue:
    """What ``DocumentSync`` and ``which_found`` ask of a catalogue, answered by a server.

    Args:
        connection: to it.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def join(self, groups: Iterable[tuple[str, str]], tenant: str = "") -> None:
        """Put documents into groups: pairs of group and document id."""
        self._ask(tenant, join=[list(pair) for pair in groups])

    def members(self, group: str, tenant: str = "") -> list[str]:
        """Ids of a group's documents."""
        return list(self._ask(tenant, groups=[group])["members"])

    def all_members(self, prefix: str, tenant: str = "") -> list[str]:
        """Ids of the documents of all groups that begin so."""
        return list(self._ask(tenant, group_prefix=prefix)["members"])

    def chunks_of(self, document_ids: Iterable[str], tenant: str = "") -> dict[str, list[str]]:
        """By id: keys of the chunks that a document holds; unknown ones are left out."""
        return dict(self._ask(tenant, ids=list(document_ids))["chunks"])

    def missing(self, keys: Iterable[str], tenant: str = "") -> list[str]:
        """Those of the keys that aren't stored."""
        wanted = list(dict.fromkeys(keys))
        return list(self._ask(tenant, missing=wanted)["missing"]) if wanted else []

    def close(self) -> None:
        """Nothing is open."""

    def _ask(self, tenant: str, **what: Any) -> Any:
        return self._connection.post("/documents/members", {**what, "tenant": tenant})


def _document(text: Text, name: str) -> dict[str, Any]:
    what = {"text": text} if isinstance(text, str) else {"token_ids": [int(token) for token in text]}
    return {"id": name or "kvblend:unnamed", **what}


def _parts(documents: list[dict[str, Any]]) -> Iterable[list[dict[str, Any]]]:
    """Parts of about a thousand; texts of one id that follow each other stay together."""
    start = 0
    while start < len(documents):
        stop = min(start + _AT_ONCE, len(documents))
        while stop < len(documents) and documents[stop]["id"] == documents[stop - 1]["id"]:
            stop += 1
        yield documents[start:stop]
        start = stop


__all__ = ["ServedCatalogue", "ServedDocuments"]
