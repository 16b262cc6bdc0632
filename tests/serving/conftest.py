"""A real server, `kvblend serve` over a tiny random model; one a session, and stopped before an engine starts."""

from __future__ import annotations

import contextlib
import gzip
import re
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kvblend_rag.commands import server_process

API_KEY = "a-key-of-the-tests"
MODEL = "tiny"
SEEN_TIMES = 3


@dataclass
class Server:
    """A server's address, and what is asked of it beside answers."""

    url: str
    log: Path
    key: str = API_KEY
    model: str = MODEL
    seen_times: int = SEEN_TIMES
    spans: list[Any] = field(default_factory=list)
    """OpenTelemetry's, as they came."""

    @cached_property
    def routes(self) -> Any:
        """A client of our routes."""
        import httpx

        headers = {"Authorization": f"Bearer {API_KEY}"}
        return httpx.Client(base_url=f"{self.url}/v1/kvblend", headers=headers, timeout=120)

    @cached_property
    def openai(self) -> Any:
        """The real client."""
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key=API_KEY, max_retries=0)

    def metrics(self) -> dict[str, float]:
        """Our counters and gauges, by name and label."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            shown = answer.read().decode()
        labels = "group|outcome|step|tier|reason|state"
        line = rf'^vllm:kvblend_(\w+?)(?:_total)?\{{.*?(?:{labels})="(\w+)".*?\}} (\S+)$'
        found = re.findall(line, shown, re.MULTILINE)
        return {f"{name} {value}": float(count) for name, value, count in found}

    def ingest(self, **body: Any) -> dict[str, Any]:
        """An ingest job that has ended."""
        answer = self.routes.post("/documents", json=body)
        assert answer.status_code == 202, answer.text
        job = answer.json()
        while job["state"] in ("waiting", "running"):
            time.sleep(0.1)
            job = self.routes.get(f"/jobs/{job['id']}").json()
        return dict(job)


@contextlib.contextmanager
def running(command: list[str], folder: Path, **environment: str) -> Iterator[Server]:
    """A server process on a free port, until the block ends."""
    with server_process.running(command, folder, VLLM_LOGGING_LEVEL="INFO", **environment) as process:
        yield Server(process.url, process.log)


@contextlib.contextmanager
def collecting() -> Iterator[tuple[str, list[Any]]]:
    """A collector of spans on a free port, until the block ends: its address, and what has come."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans: list[Any] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                spans.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    collector = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{collector.server_port}/v1/traces", spans
    finally:
        collector.shutdown()


@pytest.fixture(scope="session")
def running_server() -> Any:
    """``running_server(command, folder)``: a server of one's own."""
    return running


@pytest.fixture(scope="session")
def server(rigs: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`kvblend serve` with an API key, tool calls, traces, and learning from prompts."""
    pytest.importorskip("vllm")
    rigs.close()
    folder = tmp_path_factory.mktemp("served")
    command = [sys.executable, "-m", "kvblend_rag.cli", "serve", str(rigs.model("llama"))]
    settings = {"selector": "first", "planner": "false", "learn_seen": "true", "seen_times": SEEN_TIMES}
    command += ["--store", str(folder / "store"), *(f"--set={name}={value}" for name, value in settings.items())]
    command += ["--served-model-name", MODEL, "--api-key", API_KEY]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1536", "--max-num-batched-tokens", "512"]
    command += ["--kv-cache-memory-bytes", str(1 << 28)]
    command += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    with collecting() as (collector, spans):
        command += ["--otlp-traces-endpoint", collector]
        environment = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_BSP_SCHEDULE_DELAY": "200"}
        with running(command, folder, **environment) as made:
            made.spans = spans
            yield made
