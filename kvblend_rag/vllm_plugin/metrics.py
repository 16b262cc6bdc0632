"""What an engine's requests came to, for vLLM's ``/metrics`` and its log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvblend_rag.blend.cause import CAUSES, cause_of
from kvblend_rag.ingest import STORING
from kvblend_rag.report import BlendReport

_METRICS = {
    "requests": (
        "outcome",
        "Requests: blended, ordinary, fallback (chunks matched, and everything was computed all the same), ingest.",
    ),
    "tokens": ("group", "Prompt tokens of all but ingest, by group: cached, reused, recomputed, computed."),
    "chunks": ("tier", "Chunks of blended requests, by the tier they were loaded from."),
    "seconds": ("step", "Time of blending, by step: match, load, rotate, score, select, forward."),
    "hit_tokens": ("tier", "Tokens of stored chunks found in blended prompts, by the tier they were loaded from."),
    "load_bytes": ("tier", "Bytes of KV read for prompts, by tier."),
    "load_seconds": ("tier", "Time of these reads; reads at the same time count each."),
    "fallbacks": ("reason", f"Requests that were not blended, by kind of reason: {', '.join(CAUSES)}."),
}
"""By name, as ``vllm:kvblend_<name>_total``: its label and its meaning."""

GATE_STATES = ("open", "uncalibrated", "disabled", "verdict", "model", "closed")
"""Blending; blending with default settings, since nobody has calibrated; switched off; refused by calibration; refused
by the survey; nothing known of the model yet."""


@dataclass
class BlendStats(KVConnectorStats):
    """Counts since the last look: ``data[metric][label's value]``."""

    def count(self, report: BlendReport) -> None:
        """Take in a finished request."""
        self._add("requests", _outcome(report))
        if report.reason != STORING:
            for group in ("cached", "reused", "recomputed", "computed"):
                self._add("tokens", group, getattr(report, f"{group}_tokens"))
        for chunk in report.chunks:
            if chunk.tier:
                self._add("chunks", chunk.tier)
                self._add("hit_tokens", chunk.tier, chunk.tokens)
        for load in report.loads:
            self._add("load_bytes", load.tier, load.bytes)
            self._add("load_seconds", load.tier, load.milliseconds / 1e3)
        if report.reason not in (None, STORING) and not report.blended:
            self._add("fallbacks", cause_of(str(report.reason)))
        for step, milliseconds in report.milliseconds.items():
            self._add("seconds", step, milliseconds / 1e3)

    def show_gate(self, state: str) -> None:
        """Tell the state of the gate: one of ``GATE_STATES``."""
        self.data["gate"] = {state: 1}

    def reset(self) -> None:
        """See the base class."""
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """See the base class."""
        for metric, counts in other.data.items():
            if metric == "gate":
                self.data[metric] = dict(counts)
                continue
            for value, count in counts.items():
                self._add(metric, value, count)
        return self

    def reduce(self) -> dict[str, int | float]:
        """See the base class."""
        return {f"{metric} {value}": round(n, 3) for metric, counts in self.data.items() for value, n in counts.items()}

    def is_empty(self) -> bool:
        """See the base class."""
        return not self.data

    def _add(self, metric: str, value: str, count: float = 1) -> None:
        if count:
            counts = self.data.setdefault(metric, {})
            counts[value] = counts.get(value, 0) + count


def _outcome(report: BlendReport) -> str:
    if report.reason == STORING:
        return "ingest"
    if report.blended:
        return "blended"
    return "fallback" if "load" in report.milliseconds else "ordinary"


class BlendMetrics(KVConnectorPromMetrics):
    """The counters that ``/metrics`` shows."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: Mapping[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, dict(metric_types), labelnames, per_engine_labelvalues)
        self._counters: dict[str, Counter] = {
            name: self._counter_cls(name=f"vllm:kvblend_{name}", documentation=meaning, labelnames=[*labelnames, label])
            for name, (label, meaning) in _METRICS.items()
        }
        self._gate = self._gauge_cls(
            name="vllm:kvblend_gate",
            documentation="1 for the state of the gate: open, uncalibrated, disabled, verdict, model, closed.",
            labelnames=[*labelnames, "state"],
            multiprocess_mode="mostrecent",
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """See the base class."""
        for name, counts in transfer_stats_data.items():
            if name == "gate":
                for state in GATE_STATES:
                    self._gate.labels(*self.per_engine_labelvalues[engine_idx], state).set(counts.get(state, 0))
                continue
            for value, count in counts.items():
                self._counters[name].labels(*self.per_engine_labelvalues[engine_idx], value).inc(count)


def metric_labels() -> dict[str, str]:
    """Every metric as Prometheus names it, and its own label."""
    counters = {f"vllm:kvblend_{name}_total": label for name, (label, _) in _METRICS.items()}
    return {**counters, "vllm:kvblend_gate": "state"}


__all__ = ["GATE_STATES", "BlendMetrics", "BlendStats", "metric_labels"]
