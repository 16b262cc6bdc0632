"""Counts of requests, and how ``/metrics`` shows them."""

import re
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kvblend_rag.blend.cause import CAUSES
from kvblend_rag.ingest import STORING
from kvblend_rag.report import BlendReport, ChunkUse, TierLoad
from kvblend_rag.vllm_plugin.connector import KVBlendConnector
from kvblend_rag.vllm_plugin.metrics import BlendStats, metric_labels

BLENDED = BlendReport(
    prompt_tokens=100,
    cached_tokens=10,
    reused_tokens=60,
    recomputed_tokens=10,
    computed_tokens=20,
    blended=True,
    chunks=(ChunkUse(key="a", start=10, tokens=40, tier="memory"), ChunkUse(key="b", start=50, tokens=30, tier="disk")),
    loads=(
        TierLoad(tier="memory", chunks=1, bytes=4000, milliseconds=10.0),
        TierLoad(tier="disk", chunks=1, bytes=3000, milliseconds=490.0),
    ),
    milliseconds={"match": 2.0, "load": 500.0},
)
FALLBACK = BlendReport(
    prompt_tokens=50,
    computed_tokens=50,
    reason="/s/a.safetensors fails its checksum: ingest the chunk's text again.",
    loads=(TierLoad(tier="disk", chunks=1, bytes=500, milliseconds=5.0),),
    milliseconds={"load": 250.0},
)
ORDINARY = BlendReport(prompt_tokens=5, computed_tokens=5, reason="no chunk", milliseconds={"match": 1.0})
INGEST = BlendReport(prompt_tokens=70, computed_tokens=70, reason=STORING)


def counted(*reports):
    stats = BlendStats()
    for report in reports:
        stats.count(report)
    return stats


def test_counts_add_up():
    assert BlendStats().is_empty()
    once = counted(BLENDED, FALLBACK, ORDINARY, INGEST)
    assert once.data["requests"] == {"blended": 1, "fallback": 1, "ordinary": 1, "ingest": 1}
    assert once.data["tokens"] == {"cached": 10, "reused": 60, "recomputed": 10, "computed": 75}
    assert once.data["chunks"] == {"memory": 1, "disk": 1}
    assert once.data["seconds"] == pytest.approx({"match": 0.003, "load": 0.75})
    assert once.data["hit_tokens"] == {"memory": 40, "disk": 30}
    assert once.data["load_bytes"] == {"memory": 4000, "disk": 3500}
    assert once.data["load_seconds"] == pytest.approx({"memory": 0.01, "disk": 0.495})
    assert once.data["fallbacks"] == {"damaged": 1, "other": 1}
    both = counted(BLENDED, FALLBACK).aggregate(counted(ORDINARY, INGEST))
    assert both.data["tokens"] == once.data["tokens"]
    assert both.reduce()["requests blended"] == 1
    both.reset()
    assert both.is_empty()


def test_labels_stay_few_whatever_the_reasons():
    reports = [BlendReport(reason=f"Chunk {key} is not in the store: ingest its text again.") for key in range(50)]
    reports += [BlendReport(reason=f"something about {key}") for key in range(50)]
    assert counted(*reports).data["fallbacks"] == {"missing": 50, "other": 50}
    assert set(counted(*reports).data["fallbacks"]) <= set(CAUSES)


def test_the_gate_is_a_state_and_not_a_sum():
    older, newer = BlendStats(), BlendStats()
    older.show_gate("uncalibrated")
    newer.show_gate("open")
    assert older.aggregate(newer).data == {"gate": {"open": 1}}


def test_metrics_of_two_engines():
    registry = CollectorRegistry()

    def here(kind):
        return lambda **given: kind(**given, registry=registry)

    metrics = KVBlendConnector.build_prom_metrics(
        SimpleNamespace(kv_transfer_config=None),
        {kind: here(kind) for kind in (Counter, Gauge, Histogram)},
        ["model_name", "engine"],
        {0: ["m", "0"], 1: ["m", "1"]},
    )
    for engine, report in ((0, BLENDED), (0, BLENDED), (1, ORDINARY)):
        crossed = msgspec.msgpack.decode(msgspec.msgpack.encode(counted(report).data))
        crossed["gate"] = {"verdict" if engine else "open": 1}
        assert not KVBlendConnector.build_kv_connector_stats(crossed).is_empty()
        metrics.observe(crossed, engine)
    metrics.observe({}, 0)
    shown = generate_latest(registry).decode()
    assert 'vllm:kvblend_tokens_total{engine="0",group="reused",model_name="m"} 120.0' in shown
    assert 'vllm:kvblend_requests_total{engine="1",model_name="m",outcome="ordinary"} 1.0' in shown
    assert 'vllm:kvblend_seconds_total{engine="0",model_name="m",step="load"} 1.0' in shown
    assert 'vllm:kvblend_gate{engine="0",model_name="m",state="open"} 1.0' in shown
    assert 'vllm:kvblend_gate{engine="1",model_name="m",state="open"} 0.0' in shown
    assert 'vllm:kvblend_gate{engine="1",model_name="m",state="verdict"} 1.0' in shown
    named = set(re.findall(r"^# TYPE (vllm:kvblend_\w+) ", shown, re.M))
    assert named - {name for name in named if name.endswith("_created")} == set(metric_labels())
