"""BlendReport: what happened to one request, plain and picklable."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ChunkUse:
    """One stored chunk's part in a prompt."""

    key: str
    start: int
    """Prompt position of the first reused token."""
    tokens: int
    """Length of the run found in the prompt."""
    tier: str = ""
    """Where it was loaded from: ``memory``, ``disk``, …; empty when it was not loaded."""


@dataclass(frozen=True, kw_only=True)
class BlendReport:
    """What was matched, reused, recomputed and computed, and how long each step took.

    Each prompt token is in one of four groups, and the groups add up to ``prompt_tokens``:
    ``cached_tokens`` (taken from vLLM's own prefix cache), ``reused_tokens`` (a stored chunk's KV as
    stored), ``recomputed_tokens`` (a stored chunk's token, computed again) and ``computed_tokens``.
    """

    request_id: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    reused_tokens: int = 0
    recomputed_tokens: int = 0
    computed_tokens: int = 0
    scored_tokens: int = 0
    """Tokens run through the model only to choose what is recomputed."""
    blended: bool = False
    reason: str | None = None
    """Why nothing was blended, or less than could have been; None when all went as planned."""
    selector: str = ""
    chunks: tuple[ChunkUse, ...] = ()
    recomputed_spans: tuple[tuple[int, int], ...] = ()
    """Recomputed prompt ranges ``[start, stop)``."""
    milliseconds: dict[str, float] = field(default_factory=dict)
    """Wall time of each step: ``match``, ``load``, ``score``, ``select``, ``forward``."""

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-able; ``from_dict`` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BlendReport:
        """The report a ``to_dict`` was made from."""
        values = dict(values)
        values["chunks"] = tuple(ChunkUse(**chunk) for chunk in values.get("chunks", ()))
        values["recomputed_spans"] = tuple((a, b) for a, b in values.get("recomputed_spans", ()))
        return cls(**values)
