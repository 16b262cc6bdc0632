"""BlendReport: what happened to one request, plain and picklable."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvblend_rag.drawing import Drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SAME_BLEND = "the same blend's KV was in vLLM's own prefix cache"
"""The reason of a request that was not blended itself and yet stands on blended KV."""


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
class TierLoad:
    """What one tier gave for a prompt."""

    tier: str
    chunks: int
    bytes: int
    """Of KV, encoded where the GPU decodes it; with tensor parallelism the reporting rank's share."""
    milliseconds: float
    """To read them, and to keep them in faster tiers; reads at the same time count each."""


@dataclass(frozen=True, kw_only=True, repr=False)
class BlendReport:
    """What was matched, reused, recomputed and computed, and how long each step took.

    Each prompt token is in one of four groups, and the groups add up to ``prompt_tokens``:
    ``cached_tokens`` (taken from vLLM's own prefix cache), ``reused_tokens`` (a stored chunk's KV as
    stored), ``recomputed_tokens`` (a stored chunk's token, computed again) and ``computed_tokens``.

    Prints as one line, shows as a drawing in a notebook, and as a table in a rich terminal.
    """

    request_id: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    reused_tokens: int = 0
    recomputed_tokens: int = 0
    computed_tokens: int = 0
    scored_tokens: int = 0
    """Tokens run through the model only to choose what is recomputed."""
    uncovered_mass: float | None = None
    """Share of the selector's score that lies outside the recomputed tokens, 0 to 1; None where it makes none."""
    moved_mass: float | None = None
    """Share of the first token's probability that recomputing moved to other tokens, against reuse alone, 0 to 1;
    None where it was not compared: by the ``question`` selector, with ``max_risk`` below 1."""
    risk: float | None = None
    """Estimated risk that the blended answer differs from a full prefill's, 0 to 1; None where it was not judged."""
    blended: bool = False
    reason: str | None = None
    """Why nothing was blended, or less than could have been; None when all went as planned."""
    selector: str = ""
    chunks: tuple[ChunkUse, ...] = ()
    loads: tuple[TierLoad, ...] = ()
    """By tier: what was read, also where it was not used in the end."""
    recomputed_spans: tuple[tuple[int, int], ...] = ()
    """Recomputed prompt ranges ``[start, stop)``."""
    milliseconds: dict[str, float] = field(default_factory=dict)
    """Host time of each step: ``match``, ``load``, ``rotate`` (part of ``load`` where a kernel does both), ``score``,
    ``select``, ``forward``."""

    @property
    def on_blended_kv(self) -> bool:
        """Whether the answer stands on blended KV: its own, or that of the same blend in the prefix cache."""
        return self.blended or self.reason == SAME_BLEND

    @property
    def recomputed_share(self) -> float:
        """Recomputed tokens among those of stored chunks, 0 to 1; 0 where nothing was reused."""
        return self.recomputed_tokens / max(self.reused_tokens + self.recomputed_tokens, 1)

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-able; ``from_dict`` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BlendReport:
        """The report a ``to_dict`` was made from."""
        values = dict(values)
        values["chunks"] = tuple(ChunkUse(**chunk) for chunk in values.get("chunks", ()))
        values["loads"] = tuple(TierLoad(**load) for load in values.get("loads", ()))
        values["recomputed_spans"] = tuple((a, b) for a, b in values.get("recomputed_spans", ()))
        return cls(**values)

    def segments(self) -> list[tuple[int, int, str]]:
        """The prompt as ``(start, stop, group)``, in order; groups as in the class's description."""
        if not self.blended:
            groups = [(0, self.cached_tokens, "cached"), (self.cached_tokens, self.prompt_tokens, "computed")]
            return [(start, stop, group) for start, stop, group in groups if start < stop]
        kinds = ["computed"] * self.prompt_tokens
        marks = [(0, self.cached_tokens, "cached")]
        marks += [(chunk.start, chunk.start + chunk.tokens, "reused") for chunk in self.chunks]
        marks += [(start, stop, "recomputed") for start, stop in self.recomputed_spans]
        for start, stop, group in marks:
            kinds[start:stop] = [group] * (stop - start)
        edges = [0, *(i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]), len(kinds)]
        return [(a, b, kinds[a]) for a, b in itertools.pairwise(edges)]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the prompt, token by token, in the colours of its groups.

        Args:
            ax: matplotlib axes to draw on; None makes new ones.
        """
        return self._drawing().plot(ax)

    def __str__(self) -> str:
        groups = ", ".join(f"{count:,} {group}" for group, count in self._counts().items() if count)
        what = f"{self.prompt_tokens:,} prompt tokens: {groups or 'none'}"
        return what if self.reason is None else f"{what} ({self.reason})"

    def __repr__(self) -> str:
        return f"<BlendReport {self}>"

    def __rich__(self) -> Any:
        return self._drawing().rich()

    def _repr_html_(self) -> str:
        return self._drawing().html()

    def _counts(self) -> dict[str, int]:
        return {
            "cached": self.cached_tokens,
            "reused": self.reused_tokens,
            "recomputed": self.recomputed_tokens,
            "computed": self.computed_tokens,
        }

    def _drawing(self) -> Drawing:
        return Drawing(
            tokens=self.prompt_tokens,
            segments=self.segments(),
            counts=self._counts(),
            chunks=[(chunk.start, chunk.tier) for chunk in self.chunks],
            milliseconds=self.milliseconds,
            reason=self.reason,
        )


__all__ = ["BlendReport", "ChunkUse", "TierLoad"]
