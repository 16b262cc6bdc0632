"""What is told of a request when it has ended: to the log, to a trace, and to the workers."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvblend_rag.ingest import STORING
from kvblend_rag.report import BlendReport, TierLoad
from kvblend_rag.vllm_plugin.metadata import Closing, SeenPrompt
from kvblend_rag.vllm_plugin.scheduler.closing import ClosingDesk
from kvblend_rag.vllm_plugin.worker.worker_side import WorkerSide

DAMAGED = "/s/a.safetensors fails its checksum: ingest the chunk's text again."
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def desk(endpoint=None):
    return ClosingDesk(SimpleNamespace(observability_config=SimpleNamespace(otlp_traces_endpoint=endpoint)))


def request(headers=None):
    return SimpleNamespace(arrival_time=1000.0, trace_headers=headers)


def report(name="r", **fields):
    return BlendReport(request_id=name, prompt_tokens=9, **fields).to_dict()


def test_reports_are_taken_once_and_as_they_are_by_then():
    at = desk()
    answer = report()
    at.end(request(), answer)
    answer.update(report(reused_tokens=4, computed_tokens=5))  # the workers' account comes later
    assert [each["reused_tokens"] for each in at.take()] == [4]
    assert at.take() == []


def test_faults_are_logged_with_their_request_and_not_one_a_request(caplog):
    at = desk()
    for index in range(20):
        at.end(request(), report(f"chatcmpl-{index}", reason=DAMAGED))
    at.end(request(), report("quiet", reason="none of the 3 stored chunks stands in the prompt"))
    with caplog.at_level(logging.WARNING, "kvblend_rag"):
        at.take()
    (line,) = caplog.messages
    assert "chatcmpl-0" in line
    assert "fails its checksum" in line
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "kvblend_rag"):
        at.end(request(), report("chatcmpl-x", blended=True, reused_tokens=8))
        at.take()
    assert "chatcmpl-x" in caplog.text
    assert "8 reused" in caplog.text


def test_a_span_in_the_callers_trace():
    spans = InMemorySpanExporter()
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        provider = TracerProvider()
        trace.set_tracer_provider(provider)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    at = desk("http://collector:4317")
    load = TierLoad(tier="disk", chunks=1, bytes=64, milliseconds=2.0)
    blended = report("chatcmpl-1", blended=True, reused_tokens=7, milliseconds={"load": 2.5})
    blended["loads"] = BlendReport(loads=(load,)).to_dict()["loads"]
    at.end(request({"traceparent": f"00-{TRACE}-{PARENT}-01"}), blended)
    at.end(request(), report("chatcmpl-2", reason=DAMAGED))
    at.end(request(), report("ingest", reason=STORING))
    at.take()
    first, second = spans.get_finished_spans()
    assert (f"{first.context.trace_id:032x}", f"{first.parent.span_id:016x}") == (TRACE, PARENT)
    assert first.start_time == 1000 * 10**9
    assert first.attributes["gen_ai.request.id"] == "chatcmpl-1"
    assert first.attributes["kvblend.tokens.reused"] == 7
    assert first.attributes["kvblend.milliseconds.load"] == 2.5
    assert first.attributes["kvblend.bytes.disk"] == 64
    assert second.attributes["kvblend.cause"] == "damaged"
    assert second.parent is None


@pytest.fixture
def worker(tmp_path):
    extra = {"store_path": str(tmp_path)}
    return WorkerSide(SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_connector_extra_config=extra)))


@pytest.mark.parametrize(
    ("internal", "asked"),
    [
        ("chatcmpl-abc-1f2e3d4c", "chatcmpl-abc"),
        ("cmpl-abc-0-1f2e3d4c", "cmpl-abc"),
        ("0_chatcmpl-abc-1f2e3d4c", "chatcmpl-abc"),
        ("resp_abc_0-1f2e3d4c", "resp_abc"),
        ("x", "x"),
    ],
)
def test_a_report_is_found_by_the_answers_id(worker, internal, asked):
    worker.note(Closing([report("chatcmpl-other-1f2e3d4c"), report(internal)]))
    assert worker.report(asked)["request_id"] == internal
    assert worker.report("chatcmpl-ab") is None


def test_what_is_kept_is_bounded(worker):
    worker.note(Closing([report(f"r{index}") for index in range(5000)]))
    assert worker.report("r0") is None
    assert worker.report("r4999") is not None
    import numpy as np

    prompts = [SeenPrompt("t", np.array([index], np.int32), ((0, 1),)) for index in range(1000)]
    worker.note(Closing(seen=prompts, busy=True))
    taken = worker.take_seen(10_000)
    assert [each["token_ids"] for each in taken["prompts"]] == [[index] for index in range(744, 1000)]
    assert taken["prompts"][0]["known"] == [[0, 1]]
    assert 0 <= taken["idle"] < 60
    assert worker.take_seen(10)["prompts"] == []
