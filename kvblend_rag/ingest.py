"""Ingest: texts become chunks, and chunks become stored KV; what happened to each, in a report."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from tqdm.auto import tqdm

from kvblend_rag.blend.chunk import TokenIds, as_token_ids, chunk_key, namespace
from kvblend_rag.blend.companions import MOST, STORED, companions
from kvblend_rag.blend.context import beside
from kvblend_rag.blend.split import split_text
from kvblend_rag.config import BlendConfig
from kvblend_rag.engine import Engine
from kvblend_rag.errors import ChunkRejected, StoreError, StoreFull
from kvblend_rag.store import Catalogue

Text: TypeAlias = "str | Sequence[int] | TokenIds"
"""What is ingested: text, or the token ids that will stand in the prompt."""

MATCHING_WINDOW = 16
"""A chunk of fewer tokens can't be found again in a prompt (blend.match.ChunkIndex)."""


@dataclass(frozen=True, kw_only=True)
class IngestReport:
    """What became of the texts."""

    chunks: int = 0
    """Chunks the texts were split into, equal ones counted once."""
    computed: int = 0
    """Chunks whose KV was computed and stored now."""
    present: int = 0
    """Chunks that were stored already."""
    tokens: int = 0
    """Tokens computed."""
    seconds: float = 0.0
    keys: tuple[tuple[str, ...], ...] = ()
    """By text: the keys of its chunks, in order; with ``ingest_openings``, each behind the other's."""
    skipped: tuple[tuple[int, str], ...] = ()
    """Index of a text that was not ingested, or not all of it, and why."""

    def __str__(self) -> str:
        rate = f", {self.tokens / self.seconds:,.0f} tokens/s" if self.computed and self.seconds else ""
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        return f"{self.chunks} chunks: {self.computed} computed, {self.present} already stored{skipped}{rate}"


@dataclass
class _Pieces:
    """One text, cut into chunks."""

    keys: list[str] = field(default_factory=list)
    reason: str | None = None


@dataclass(frozen=True)
class _Wanted:
    """A chunk that the store lacks."""

    space: str
    chunk: TokenIds
    companion: TokenIds | None = None


class Documents(ABC):
    """The chunk store of an engine that looks after it itself, as a server does."""

    catalogue: Any
    """Answers what ``Catalogue`` is asked of documents: ``join``, ``members``, ``all_members``, ``chunks_of``,
    ``missing``."""

    @abstractmethod
    async def ingest(
        self, texts: Sequence[Text], ids: Sequence[str] | None, tenant: str, *, replace: bool, progress: bool
    ) -> IngestReport:
        """Compute and store the KV of texts; the report is without ``keys``."""

    @abstractmethod
    async def release(self, ids: Sequence[str], tenant: str) -> int:
        """Forget documents; how many chunks were deleted."""

    @abstractmethod
    async def prefetch(self, texts: Sequence[Text], ids: Sequence[str], chunks: Sequence[str], tenant: str) -> int:
        """Bring chunks into the fastest tier; how many are there now."""


class Ingester:
    """Cuts texts into chunks, and has an engine compute those that the store does not hold.

    Args:
        engine: computes and stores.
        catalogue: tells what is stored.
        config: chunk size and tenant.
    """

    def __init__(self, engine: Engine, catalogue: Catalogue, config: BlendConfig) -> None:
        self._engine, self._catalogue, self._config = engine, catalogue, config
        info = engine.info
        self.namespace = namespace(info.fingerprint, info.context, config.tenant)
        self._contexts = {self.namespace: as_token_ids(info.context)}
        if info.header is not None:
            self._contexts[namespace(info.fingerprint, info.header, config.tenant)] = as_token_ids(info.header)
        self._longest = min(config.chunk_size, info.max_model_len - len(info.context) - 1)

    def cut(self, text: Text) -> list[TokenIds]:
        """A text's chunks, each int32 of shape (tokens,), at most ``chunk_size`` long.

        Token ids are taken as they are; too many of them are cut into equal pieces.

        Raises:
            ChunkRejected: the text is empty, or too short to be found again.
        """
        whole = self._encode(text) if isinstance(text, str) else as_token_ids(text)
        if not len(whole) or (isinstance(text, str) and not text.strip()):
            raise ChunkRejected("The chunk is empty: there is nothing to precompute.")
        if len(whole) < MATCHING_WINDOW:
            raise ChunkRejected(
                f"The chunk has {len(whole)} tokens, and fewer than {MATCHING_WINDOW} can't be found again in a "
                "prompt: join it with its neighbours."
            )
        if len(whole) <= self._longest:
            return [whole]
        if not isinstance(text, str):
            return np.array_split(whole, -(-len(whole) // self._longest))
        pieces = split_text(text, lambda part: len(self._encode(part)), self._longest, MATCHING_WINDOW)
        return [tokens for tokens in map(self._encode, pieces) if len(tokens) >= MATCHING_WINDOW]

    def keys_of(self, chunk: TokenIds) -> list[str]:
        """The keys under which a chunk is stored: behind the ingest context, and as an opening where it is one too."""
        return [chunk_key(space, chunk) for space in self._contexts]

    def keys(self, text: Text) -> list[str]:
        """The keys of a text's chunks; none for a text that could not be ingested."""
        try:
            return [key for chunk in self.cut(text) for key in self.keys_of(chunk)]
        except ChunkRejected:
            return []

    async def ingest(
        self,
        texts: Sequence[Text],
        document_ids: Sequence[str] | None,
        bar: tqdm[Any],
        *,
        alone: bool = False,
    ) -> tuple[list[_Pieces], dict[str, TokenIds], dict[str, str]]:
        """Have every chunk of the texts stored.

        Args:
            texts: what is cut and computed.
            document_ids: who holds each text's chunks; None: nobody in particular.
            bar: shows how many of the chunks are dealt with.
            alone: compute the chunks without companions, also where the ingest context has room for one.

        Returns:
            Pieces by text; token ids of the chunks that were computed, by key; why chunks were not
            stored, by key.
        """
        # In a thread: the engine's loop goes on answering meanwhile.
        pieces, known, wanted = await asyncio.to_thread(self._prepare, texts, document_ids, alone)
        bar.reset(total=known + len(wanted))
        bar.update(known)
        failed = await self._compute(wanted, bar)
        return pieces, {key: each.chunk for key, each in wanted.items()}, failed

    def _prepare(
        self, texts: Sequence[Text], document_ids: Sequence[str] | None, alone: bool
    ) -> tuple[list[_Pieces], int, dict[str, _Wanted]]:
        tokens: dict[str, tuple[str, TokenIds]] = {}
        pieces = []
        for text in texts:
            piece = _Pieces()
            try:
                for chunk in self.cut(text):
                    for space, key in zip(self._contexts, self.keys_of(chunk), strict=True):
                        tokens[key] = space, chunk
                        piece.keys.append(key)
            except ChunkRejected as error:
                piece.reason = str(error)
            pieces.append(piece)
        self._hold(pieces, document_ids)
        missing = self._catalogue.missing(tokens)
        wanted = {key: _Wanted(*tokens[key]) for key in missing}
        if self._engine.info.permit and not alone:
            self._accompany(wanted)
        return pieces, len(tokens) - len(wanted), wanted

    def _accompany(self, wanted: dict[str, _Wanted]) -> None:
        """Find the chunks' companions."""
        stored = self._catalogue.newest(self.namespace, STORED)
        ours = [key for key, each in wanted.items() if each.space == self.namespace]
        for start in range(0, len(ours), MOST):
            some = {key: wanted[key].chunk for key in ours[start : start + MOST]}
            among = [*some.values(), *stored.values()]
            for key, at in zip(some, companions(among, len(some)), strict=True):
                if at is not None:
                    wanted[key] = replace(wanted[key], companion=among[at])

    def _hold(self, pieces: Iterable[_Pieces], document_ids: Sequence[str] | None) -> None:
        # Holds before rows: a release elsewhere can't take a chunk away between the question and the answer.
        tenant = self._config.tenant
        if document_ids is None:
            self._catalogue.hold("", [key for piece in pieces for key in piece.keys], tenant)
            return
        by_document: dict[str, list[str]] = {}
        for piece, document_id in zip(pieces, document_ids, strict=True):
            by_document.setdefault(document_id, []).extend(piece.keys)
        self._catalogue.hold_all(by_document, tenant)

    async def _compute(self, wanted: dict[str, _Wanted], bar: tqdm[Any]) -> dict[str, str]:
        failed: dict[str, str] = {}
        gate = asyncio.Semaphore(self._engine.chunks_at_once)

        async def one(key: str, each: _Wanted) -> None:
            async with gate:
                if not failed:
                    reason = await self._compute_one(key, each)
                    if reason is not None:
                        failed[key] = reason
                bar.update()

        try:
            await asyncio.gather(*(one(key, each) for key, each in wanted.items()))
        finally:
            # Also after Ctrl-C: what was computed gets written and listed.
            for failures in await self._engine.call("flush"):
                failed.update(failures)
        for key in self._catalogue.missing(wanted):
            failed.setdefault(key, "the chunk was computed and did not reach the store")
        return failed

    async def _compute_one(self, key: str, wanted: _Wanted) -> str | None:
        context = self._contexts[wanted.space]
        ingest = {"key": key, "namespace": wanted.space, "start": len(context)}
        if wanted.companion is not None:
            context = beside(context, wanted.companion, self._encode("\n\n"))
            ingest["permit"] = self._engine.info.permit
        options = {"tenant": self._config.tenant, "ingest": ingest}
        prompt, reason = np.concatenate([context, wanted.chunk]), None
        async for output in self._engine.generate(prompt, self._engine.one_token(), options=options):
            reason = output.report.reason
        return None if reason == STORING else reason

    def _encode(self, text: str) -> TokenIds:
        return as_token_ids(self._engine.tokenizer.encode(text, add_special_tokens=False))


STORING = "the request computes a chunk in order to store it"
"""The report's reason on a request that ingests."""


def raise_if_store_failed(failed: dict[str, str]) -> None:
    """Raise what kept chunks from being stored, in one sentence.

    Raises:
        StoreFull: no space left.
        StoreError: anything else.
    """
    if not failed:
        return
    reason = next(iter(failed.values())).rstrip(".")
    full = "space" in reason
    raise (StoreFull if full else StoreError)(f"{len(failed)} chunks could not be stored: {reason}.")


__all__ = ["MATCHING_WINDOW", "STORING", "Documents", "IngestReport", "Ingester", "raise_if_store_failed"]
