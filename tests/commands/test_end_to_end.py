"""The command as a user runs it: in a process of its own, starting an engine of its own."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from kvblend_rag.demo.reader import prepare_reader
from kvblend_rag.store import Catalogue


@pytest.fixture(scope="module", autouse=True)
def one_engine_at_a_time(rigs):
    rigs.close()


def finished(process, timeout=800):
    out, error = process.communicate(timeout=timeout)
    return process.returncode, out, error


def test_the_demo(in_a_process, tmp_path):
    """Two real questions of the real reader; what the table says, not how fast it was."""
    prepare_reader(progress=False)  # twenty seconds on the first run, and its bar would be in the way
    file = tmp_path / "demo.json"
    arguments = ["--questions", 2, "-k", 4, "--eager", "--store", tmp_path / "store", "--json", file]
    code, out, error = finished(in_a_process("demo", *arguments))
    assert (code, error.strip()) == (0, "")
    assert "55 documents, embedded with wordllama, found with FAISS" in out
    ingested = re.search(r"Ingested: (\d+) chunks: (\d+) computed, 0 already stored", out)
    assert ingested
    assert int(ingested[1]) == int(ingested[2]) >= 40
    for heading in ("prompt tokens", "reused", "recomputed", "computed", "plain vLLM answers", "right", "same"):
        assert heading in out
    for ending in ("First token", "Right:", "The same answer:", "Next:"):
        assert ending in out
    result = json.loads(file.read_text())
    assert len(result["questions"]) == 2
    for asked in result["questions"]:
        report = asked["report"]
        assert asked["question"].split()[0] in out
        assert report["blended"], report["reason"]
        assert len(asked["sources"]) == 4
        assert 500 < report["prompt_tokens"] < 2000
        reused, recomputed = report["reused_tokens"], report["recomputed_tokens"]
        assert reused + recomputed > 0.8 * report["prompt_tokens"]
        assert 0.1 < recomputed / (reused + recomputed) <= 0.15
        assert f"{report['prompt_tokens']:,}" in out
        assert f"{reused:,}" in out
        assert asked["same"] == (asked["plain"]["answer"] == asked["blended"]["answer"])
        for way in ("plain", "blended"):
            assert asked[way]["ttft_seconds"] > 0
            assert asked[way]["answer"]
            assert isinstance(asked[way]["right"], bool)


@pytest.fixture
def many_documents(tmp_path):
    folder = tmp_path / "documents"
    folder.mkdir()
    for number in range(150):
        lines = [
            f"Report {number}, line {line}: the gauge showed {number * line % 97} and all was well."
            for line in range(12)
        ]
        (folder / f"{number:03}.txt").write_text("\n".join(lines))
    return folder


def test_ctrl_c_during_ingest_loses_nothing(in_a_process, many_documents, tiny_model, tmp_path):
    """As in a terminal: the whole process group gets the signal. What was computed is stored; a second run goes on."""
    store = tmp_path / "store"
    arguments = ["ingest", many_documents, "--model", tiny_model("llama"), "--store", store, "--eager"]
    settings = {
        "KVBLEND_ENGINE_ARGS": json.dumps({"dtype": "float32", "max_model_len": 2048, "kv_cache_memory_bytes": 1 << 28})
    }
    process = in_a_process(*arguments, **settings)
    give_up = time.monotonic() + 600
    while len(list(store.glob("chunks/*/*.safetensors"))) < 5:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < give_up
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    code, out, error = finished(process)
    assert code == 130
    assert out == ""
    assert error.strip() == "Interrupted. What was stored stays stored; run it again to go on."
    assert not list(Path("/tmp").glob(f"kvblend-vllm-{process.pid}*"))
    catalogue = Catalogue(store)
    stored = catalogue.stats()["chunks"]
    catalogue.close()
    assert stored >= 5

    code, out, error = finished(in_a_process(*arguments, **settings))
    assert (code, error.strip()) == (0, "")
    found = re.search(r"150 documents in (\d+) chunks: (\d+) computed, (\d+) already stored", out)
    assert found
    chunks, computed, present = map(int, found.groups())
    assert computed + present == chunks
    assert present >= stored - 1
    code, out, error = finished(in_a_process("store", "check", "--store", store))
    assert code == 0, out + error
    assert f"{chunks} chunk files are sound" in out
