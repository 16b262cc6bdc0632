"""The offline interface of CacheBlend's first script: precompute chunks, combine them, close the engine."""

from __future__ import annotations

from collections.abc import Sequence

from kvblend_rag.errors import ChunkRejected
from kvblend_rag.ingest import IngestReport
from kvblend_rag.kvblend import close_all
from kvblend_rag.llm import LLM


class OfflineKVPreCompute:
    """Precomputes the KV of chunks with a model that is loaded already."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def precompute_kv(self, chunk: str, *, progress: bool = False) -> IngestReport:
        """Compute and store one chunk; at once when it is stored already.

        Args:
            chunk: its text, as it will stand in the prompt; longer than ``chunk_size`` tokens, it is split.
            progress: show a progress bar.

        Raises:
            ChunkRejected: the chunk is empty, or too short to be found again in a prompt.
            StoreError: the store can't be written.
        """
        report = self._llm.kvblend.ingest(chunk, progress=progress)
        if report.skipped:
            raise ChunkRejected(report.skipped[0][1])
        return report


def combine_input_prompt_chunks(prompt_chunks: Sequence[str]) -> str:
    """One prompt out of system prompt, chunks and question: their texts joined, nothing between them.

    No separators are needed: chunks are found by their tokens. Parts that need a blank line between them
    must hold it.
    """
    return "".join(prompt_chunks)


def close_engine() -> None:
    """Stop every engine of this process, and free its memory."""
    close_all()


__all__ = ["OfflineKVPreCompute", "close_engine", "combine_input_prompt_chunks"]
