"""Measurement: what calibration has seen of one model behind one ingest context; plain numbers, no engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvblend_rag.config import IngestContextKind


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Which model, behind what."""

    model: str
    """Its name, for people."""
    fingerprint: str
    dtype: str
    context: IngestContextKind
    context_digest: str


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """The largest relative error of stored KV against computed KV, as loaded at another position."""

    error: float
    noise: float
    """The largest between two computations of the same tokens by the model alone."""
    moved: float = 0.0
    """The largest of the values alone, computed by the model at the two positions."""
    where: str = ""
    """Which half, layer and chunk."""
    chunks: int = 0
    """How many were looked at."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One way of blending; one figure a question, all in the same order of questions."""

    settings: Mapping[str, Any]
    """Settings of ``BlendConfig`` by name, those a verdict decides."""
    recomputed: tuple[float, ...]
    """Share of chunk tokens recomputed, 0 to 1."""
    kl: tuple[float, ...]
    """KL of a full prefill's next-token distributions to these, nats, mean over the gold answer."""
    loss: tuple[float, ...]
    """Negative log-likelihood of the gold answer less the full prefill's, nats a token."""
    same: tuple[float, ...]
    """1 where the greedy answer is the full prefill's."""

    @property
    def share(self) -> float:
        """Mean share recomputed."""
        return float(np.mean(self.recomputed))


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Everything a verdict is made from."""

    identity: Identity
    deviation: Deviation
    noise_kl: tuple[float, ...]
    """KL of two full prefills, by question."""
    exact_kl: tuple[float, ...]
    """KL of a full prefill and everything recomputed, by question."""
    blind_kl: tuple[float, ...]
    """KL of a full prefill and the question without its documents: what there is to lose."""
    cells: tuple[Cell, ...]
    """Reuse alone and every budget."""
    variations: tuple[Cell, ...] = ()
    """The most promising of these with other spans, and with other layers."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Machine, versions, command; JSON-able."""

    @property
    def questions(self) -> int:
        """How many were asked."""
        return len(self.exact_kl)

    def to_dict(self) -> dict[str, Any]:
        """All figures, JSON-able."""
        return dataclasses.asdict(self)


__all__ = ["Cell", "Deviation", "Identity", "Measurement"]
