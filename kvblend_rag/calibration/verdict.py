"""Verdict: whether a model may be blended, and how; one JSON file a model and ingest context, beside the store.

``kvblend calibrate`` writes it. The engine reads it at start: with ``accepted`` its settings are the defaults,
with ``refused`` every request is an ordinary prefill; ``undecided`` or without one the configured budget holds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kvblend_rag.blend.chunk import model_of, namespace
from kvblend_rag.calibration.risk import DEFAULT_RISK, RiskModel
from kvblend_rag.config import BlendConfig, IngestContextKind
from kvblend_rag.errors import ConfigError, StoreError

FOLDER = "verdicts"
FORMAT = 1
SETTINGS = ("selector", "recompute_ratio", "coverage", "full_prefill_share", "span_size", "score_layers", "carry")
"""The settings that a verdict decides, beside the ingest context."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What calibration found out about one model behind one ingest context."""

    status: Literal["accepted", "refused", "undecided"]
    """``undecided``: too few questions to tell; the engine then does as without a verdict."""
    reason: str
    """Why it is refused or undecided, or what was found, in words a user understands."""
    model: str
    """Its name, for people."""
    fingerprint: str
    """The model's identity, from the engine."""
    context: IngestContextKind
    context_digest: str
    """Of model and ingest context: a verdict holds for no other system prompt, tokenizer or weights."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of ``BlendConfig`` by name, those of ``SETTINGS``; empty unless accepted."""
    risk: RiskModel = DEFAULT_RISK
    measured: dict[str, Any] = field(default_factory=dict)
    """Summary of the measurement, JSON-able."""
    made: str = ""
    """When, ISO 8601."""
    format: int = FORMAT

    @property
    def accepted(self) -> bool:
        """Whether the model may be blended."""
        return self.status == "accepted"

    @property
    def cost(self) -> float:
        """Measured share of chunk tokens that is recomputed, 0 to 1."""
        return float(self.measured.get("recomputed_share", self.settings.get("recompute_ratio", 1.0)))

    def applied_to(self, config: BlendConfig) -> BlendConfig:
        """The settings with the verdict's where the user gave none, that is where a setting has its default."""
        plain = BlendConfig()
        open_ = {name for name in SETTINGS if getattr(config, name) == getattr(plain, name)}
        return config.replace(**{name: value for name, value in self.settings.items() if name in open_})

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-able; ``from_dict`` reads it back."""
        return {**dataclasses.asdict(self), "risk": self.risk.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Verdict:
        """The verdict a ``to_dict`` was made from.

        Raises:
            ValueError: of another format, or incomplete.
            ConfigError: its settings can't be used.
        """
        try:
            if values["format"] != FORMAT:
                raise ValueError(f"its format is {values['format']}, and this release reads {FORMAT}")
            verdict = cls(**{**values, "risk": RiskModel.from_dict(values["risk"])})
            if verdict.status not in ("accepted", "refused", "undecided") or not verdict.settings.keys() <= set(
                SETTINGS
            ):
                raise ValueError("it holds an unknown status or setting")
            BlendConfig().replace(ingest_context=verdict.context, **verdict.settings)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it is incomplete or holds too much ({error})") from error
        return verdict


def write_verdict(verdict: Verdict, store_path: str | Path) -> Path:
    """Write a verdict beside the store, in place of an earlier one.

    Raises:
        StoreError: the folder can't be written.
    """
    path = _folder(store_path, verdict.fingerprint) / f"{verdict.context}-{verdict.context_digest[:16]}.json"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(verdict.to_dict(), indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise StoreError(
            f"The verdict {path} can't be written ({error.strerror}): give this user write permission, or choose "
            "another store_path."
        ) from error
    return path


def read_verdicts(store_path: str | Path, fingerprint: str) -> list[Verdict]:
    """Every verdict on a model, by ingest context.

    Raises:
        ConfigError: a file that can't be read; a verdict must not get lost, since it may be a refusal.
    """
    verdicts = []
    for path in sorted(_folder(store_path, fingerprint).glob("*.json")):
        try:
            verdict = Verdict.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, ConfigError) as error:
            raise ConfigError(
                f"The verdict {path} can't be used: {str(error).rstrip('.')}. Delete it, or run `kvblend calibrate` "
                "again."
            ) from error
        if model_of(verdict.fingerprint) == model_of(fingerprint):
            verdicts.append(verdict)
    return verdicts


def find_verdict(config: BlendConfig, fingerprint: str, context: Sequence[int]) -> Verdict | None:
    """The verdict on a model behind an ingest context; None where there is none or none is wanted.

    Args:
        config: where the store is, and whether verdicts are heeded.
        fingerprint: the model's.
        context: token ids of the ingest context.

    Raises:
        ConfigError: a file that can't be read.
    """
    if not config.heed_verdict:
        return None
    digest = namespace(model_of(fingerprint), context)
    found = [each for each in read_verdicts(config.store_path, fingerprint) if each.context_digest == digest]
    return found[0] if found else None


def preferred_context(config: BlendConfig, fingerprint: str) -> IngestContextKind:
    """The ingest context to use: the best accepted verdict's, where the user chose none.

    Raises:
        ConfigError: a file that can't be read.
    """
    if not config.heed_verdict or config.ingest_context != BlendConfig().ingest_context:
        return config.ingest_context
    best = best_of(read_verdicts(config.store_path, fingerprint))
    return config.ingest_context if best is None else best.context


def best_of(verdicts: Iterable[Verdict]) -> Verdict | None:
    """The accepted verdict that recomputes least; None where all refuse."""
    return min((each for each in verdicts if each.accepted), key=lambda each: each.cost, default=None)


def _folder(store_path: str | Path, fingerprint: str) -> Path:
    name = hashlib.blake2b(model_of(fingerprint).encode(), digest_size=16).hexdigest()
    return Path(store_path).expanduser() / FOLDER / name


__all__ = [
    "FOLDER",
    "FORMAT",
    "SETTINGS",
    "Verdict",
    "best_of",
    "find_verdict",
    "preferred_context",
    "read_verdicts",
    "write_verdict",
]
