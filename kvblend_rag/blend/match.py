"""ChunkIndex: finds stored chunks anywhere in a prompt."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Match:
    """A run of a stored chunk's tokens that stands in a prompt, verified token by token.

    ``prompt[start:start + length] == chunk[chunk_start:chunk_start + length]``
    """

    key: str
    start: int
    chunk_start: int
    length: int

    @property
    def stop(self) -> int:
        """The first prompt position behind the run."""
        return self.start + self.length
