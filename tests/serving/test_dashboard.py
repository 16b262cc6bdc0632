"""The Grafana dashboard names metrics that are exported, with labels and values that they have; and all of ours."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from kvblend_rag.vllm_plugin.metrics import GATE_STATES, metric_labels

DASHBOARD = json.loads((Path(__file__).parents[2] / "deploy/grafana/kvblend.json").read_text(encoding="utf-8"))
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
LABELS = metric_labels()
VALUES = {
    "outcome": {"blended", "ordinary", "fallback", "ingest"},
    "group": {"cached", "reused", "recomputed", "computed"},
    "state": set(GATE_STATES),
}
THEIRS = {"vllm:time_to_first_token_seconds_bucket"}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_metric_is_exported(expression):
    named = set(re.findall(r"vllm:\w+", expression))
    assert named
    assert named <= set(LABELS) | THEIRS


def test_every_metric_of_ours_is_shown():
    assert set(LABELS) == set(re.findall(r"vllm:kvblend_\w+", " ".join(EXPRESSIONS)))


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_labels_and_values_are_those_of_the_metric(expression):
    for name, inside in re.findall(r"(vllm:kvblend_\w+)\{([^}]*)\}", expression):
        for label, values in re.findall(r'(\w+)!?=~?"([^"]*)"', inside):
            assert label in ("model_name", LABELS[name])
            if label != "model_name":
                assert set(values.split("|")) <= VALUES[label]
    for label in re.findall(r"sum by \((\w+)\)", expression):
        assert label == "le" or label in LABELS.values()


def test_it_is_a_dashboard_that_grafana_takes():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    assert DASHBOARD["uid"]
    assert {each["name"] for each in DASHBOARD["templating"]["list"]} == {"source", "model"}
    used = set(re.findall(r"\$(?!__)\{?(\w+)", json.dumps(DASHBOARD)))
    assert used == {"source", "model"}
