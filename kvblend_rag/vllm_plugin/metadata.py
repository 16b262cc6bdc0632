"""All that crosses between the scheduler's process and the workers', and what it leaves out.

The worker never learns of queues, other requests or the catalogue; the scheduler never sees a tensor.
Everything here is pickled by vLLM at every step, so it stays small.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvblend_rag.blend.chunk import TokenIds
from kvblend_rag.blend.cost import Pace
from kvblend_rag.blend.plan import BlendPlan
from kvblend_rag.calibration.risk import Signals
from kvblend_rag.config import ScoreLayers
from kvblend_rag.report import TierLoad

DEVICE = "device"
"""What reports call the tier of chunks in the GPU's own memory."""

ANOTHER_RANK = "another rank could not load its part of a chunk"
"""Why a rank computed everything whose own part was sound."""


@dataclass(frozen=True)
class Recipe:
    """How the recomputed tokens of one request are chosen."""

    selector: str
    ratio: float
    span: int
    coverage: float = 1.0
    full_share: float = 1.0
    layers: ScoreLayers = "later"
    carry: float = 0.0
    watched: bool = False
    """Whether the request's risk is judged: the next token is compared before and after recomputing."""


@dataclass(frozen=True)
class BlendJob:
    """One request to blend in this step: everything but its last token, from ``first`` on."""

    request_id: str
    token_ids: TokenIds
    block_ids: npt.NDArray[np.int32]
    first: int
    plan: BlendPlan
    recipe: Recipe


@dataclass(frozen=True)
class SaveJob:
    """Copy a chunk's KV out of the paged cache after this step; prompt positions ``[start, stop)``."""

    request_id: str
    key: str
    namespace: str
    token_ids: TokenIds
    start: int
    block_ids: npt.NDArray[np.int32]

    @property
    def stop(self) -> int:
        """The first position behind the chunk."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True)
class SeenPrompt:
    """A prompt that may hold chunks nobody has ingested (``learn_seen``)."""

    tenant: str
    token_ids: TokenIds
    known: tuple[tuple[int, int], ...]
    """Ranges ``[start, stop)`` that stand in the store already."""


@dataclass(frozen=True)
class Closing:
    """What the front end may ask the workers for later, since it can't ask the scheduler."""

    reports: list[dict[str, Any]] = field(default_factory=list)
    """Of the requests that have ended, as ``BlendReport.to_dict``."""
    seen: list[SeenPrompt] = field(default_factory=list)
    busy: bool = False
    """Whether the step computes anything but chunks to be stored."""


@dataclass
class StepPlan(KVConnectorMetadata):
    """Scheduler to workers, each step."""

    blends: list[BlendJob] = field(default_factory=list)
    saves: list[SaveJob] = field(default_factory=list)
    met_again: dict[str, Signals] = field(default_factory=dict)
    """Requests that run on an earlier blend's KV out of the prefix cache, and what that showed."""
    closing: Closing = field(default_factory=Closing)
    """What the last step ended."""
    number: int = 0
    """Of the step."""
    fetch: list[str] = field(default_factory=list)
    """Chunks to bring into host memory, from this step on."""


@dataclass(frozen=True)
class Outcome:
    """What a worker did for one blended request."""

    recomputed: tuple[tuple[int, int], ...] = ()
    tiers: dict[str, str] = field(default_factory=dict)
    scored_tokens: int = 0
    uncovered: float | None = None
    """Share of the selector's score outside the recomputed tokens; None where it made none."""
    loads: tuple[TierLoad, ...] = ()
    milliseconds: dict[str, float] = field(default_factory=dict)
    fallback: str | None = None
    """Why everything was computed instead of blended."""
    moved: float | None = None
    """Share of the next token's probability that recomputing moved; None where it was not compared."""

    @property
    def signals(self) -> Signals:
        """What is known of the answer's risk before its first token."""
        return Signals(uncovered_mass=self.uncovered, moved_mass=self.moved)


@dataclass
class StepOutcome(KVConnectorWorkerMetadata):
    """Workers to scheduler, each step: outcome by request id, and what was measured since the last."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    in_memory: dict[str, bool] = field(default_factory=dict)
    """Chunks that came into host memory, or (False) left it."""
    loads: list[TierLoad] = field(default_factory=list)
    """What was read beside the requests."""
    step_seconds: dict[int, float] = field(default_factory=dict)
    """Of vLLM's own forward passes, by the step's number."""
    blend_seconds: dict[str, float] = field(default_factory=dict)
    """By request, reading its chunks included."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Ranks agree on what they do, so one rank's account stands for all; what went wrong only one may know."""
        assert isinstance(other, StepOutcome)
        known = {name: each for name, each in other.outcomes.items() if each.fallback not in (None, ANOTHER_RANK)}
        return dataclasses.replace(self, outcomes={**other.outcomes, **self.outcomes, **known})


@dataclass(frozen=True)
class Handshake(KVConnectorHandshakeMetadata):
    """Workers to scheduler, once at start: what model this is and whether it can be blended."""

    fingerprint: str
    context: tuple[int, ...]
    """Token ids of the ingest context."""
    refusal: str | None
    rank: int
    ranks: int
    pace: Pace | None = None
    """How fast it computes and blends; None where nobody plans by it."""
    loads: tuple[TierLoad, ...] = ()
    """What reading some stored chunks took."""
    header: tuple[int, ...] | None = None
    """Token ids that chunks are computed behind a second time, as openings; None where they are not."""
    permit: str = ""
    """What an ingest must show to put a chunk behind a companion; empty: none may."""


__all__ = [
    "ANOTHER_RANK",
    "DEVICE",
    "BlendJob",
    "Closing",
    "Handshake",
    "Outcome",
    "Recipe",
    "SaveJob",
    "SeenPrompt",
    "StepOutcome",
    "StepPlan",
]
