"""When a step's blends go to the device: once, ahead of vLLM's own preparation, and never ahead of its block writes."""

import contextlib
from types import SimpleNamespace

import pytest

from kvblend_rag.vllm_plugin import compat
from kvblend_rag.vllm_plugin.metadata import StepPlan
from kvblend_rag.vllm_plugin.worker.worker_side import WorkerSide
from kvblend_rag.vllm_plugin.worker_cls import KVBlendWorker

WORK = ["note", "meet_again", "blend", "fetch"]


def test_a_plan_is_begun_once_whoever_comes_first(monkeypatch):
    done = []
    for name in WORK:
        monkeypatch.setattr(WorkerSide, name, lambda self, given, name=name: done.append(name))
    side = object.__new__(WorkerSide)
    side._begun = None
    plan = StepPlan()
    side.begin(plan)
    side.begin(plan)
    assert done == WORK
    side.begin(StepPlan())
    assert done == 2 * WORK


@pytest.fixture
def step(monkeypatch):
    """Runs a step of a worker, and says what came in which order."""
    order = []
    side = SimpleNamespace(step=lambda number: contextlib.nullcontext(), begin=lambda plan: order.append("blend"))
    platform = KVBlendWorker.__mro__[1]
    monkeypatch.setattr(platform, "execute_model", lambda self, output: order.append("vLLM"))
    monkeypatch.setattr(compat, "find_connector", lambda kind: SimpleNamespace(worker=side))

    def run(plan, **writes):
        order.clear()
        output = SimpleNamespace(kv_connector_metadata=plan, **writes)
        KVBlendWorker.execute_model(object.__new__(KVBlendWorker), output)
        return list(order)

    return run


def test_blends_are_launched_before_vllm_prepares_its_inputs(step):
    assert step(StepPlan(), new_block_ids_to_zero=None, kv_cache_block_copies=[]) == ["blend", "vLLM"]
    assert step(StepPlan()) == ["blend", "vLLM"]  # a vLLM that knows of neither


@pytest.mark.parametrize("name", ["new_block_ids_to_zero", "kv_cache_block_copies"])
def test_blocks_that_vllm_writes_itself_come_first(step, name):
    assert step(StepPlan(), **{name: [7]}) == ["vLLM"]


def test_another_connectors_plan_is_left_to_vllm(step):
    assert step(object()) == ["vLLM"]
