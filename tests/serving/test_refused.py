"""A calibration's refusal is heeded wherever a model is asked: `LLM`, the server, and both frameworks' classes."""

from __future__ import annotations

import sys
from typing import Any

import pytest

pytest.importorskip("vllm")
pytest.importorskip("openai")

from kvblend_rag import LLM, BlendConfig, SamplingParams
from kvblend_rag.blend.chunk import model_of, namespace
from kvblend_rag.calibration.verdict import Verdict, write_verdict

pytestmark = [pytest.mark.full, pytest.mark.timeout(1200)]

TEXT = "Ledger. " + " ".join(f"On day {day} the clerk paid {day * 7} crowns to the mill." for day in range(12))
ASKED = f"Read.\n\n{TEXT}\n\nWhat was paid on day 9?"
ARGUMENTS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1536, "kv_cache_memory_bytes": 1 << 28}


@pytest.fixture(scope="module")
def refused(rigs: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a store with a chunk of the text, and a verdict that refuses the model."""
    rigs.close()
    store, model = tmp_path_factory.mktemp("refused"), str(rigs.model("llama"))
    config = BlendConfig(store_path=str(store), planner=False)
    with LLM(model, config=config, **ARGUMENTS) as llm:
        assert llm.kvblend.ingest([TEXT], progress=False).computed == 1
        (answer,) = llm.generate(ASKED, SamplingParams(max_tokens=4, temperature=0))
        assert answer.report.blended
        info = llm.kvblend.engine.info
    verdict = Verdict(
        status="refused",
        reason="it keeps too little",
        model=info.model,
        fingerprint=info.fingerprint,
        context="long",
        context_digest=namespace(model_of(info.fingerprint), info.context),
        settings={},
    )
    write_verdict(verdict, store)
    return model, config


def test_by_the_engine(refused: Any) -> None:
    model, config = refused
    with LLM(model, config=config, **ARGUMENTS) as llm:
        (answer,) = llm.generate(ASKED, SamplingParams(max_tokens=4, temperature=0))
        assert not answer.report.blended
        assert "it keeps too little" in answer.report.reason
    with LLM(model, config=config.replace(heed_verdict=False), **ARGUMENTS) as llm:
        (answer,) = llm.generate(ASKED, SamplingParams(max_tokens=4, temperature=0))
        assert answer.report.blended


def test_by_the_server_and_what_asks_it(refused: Any, running_server: Any, tmp_path: Any) -> None:
    from langchain_kvblend import ChatKVBlend
    from llama_index.llms.kvblend import KVBlendLLM
    from openai import OpenAI

    model, config = refused
    command = [sys.executable, "-m", "kvblend_rag.cli", "serve", model, "--store", config.store_path]
    command += ["--set=planner=false", "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "1536", "--kv-cache-memory-bytes", str(1 << 28)]
    with running_server(command, tmp_path) as server:
        url = f"{server.url}/v1"
        client = OpenAI(base_url=url, api_key="none")
        messages = [{"role": "user", "content": ASKED}]
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4)
        chain = ChatKVBlend(base_url=url, model="tiny", temperature=0, max_tokens=4)
        index = KVBlendLLM("tiny", base_url=url, temperature=0, max_tokens=4)
        reports = [
            answer.model_extra["kv_transfer_params"]["kvblend"],
            chain.invoke(ASKED).response_metadata["blend_report"],
            index.complete(ASKED).raw["report"].to_dict(),
        ]
        for report in reports:
            assert not report["blended"]
            assert "it keeps too little" in report["reason"]
        assert server.metrics()["gate verdict"] == 1
        chain.close()
        index.close()
