from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import langchain_kvblend
import pytest
from langchain_kvblend import ChatKVBlend, KVBlendLLM

from kvblend_rag import KVBlend
from kvblend_rag.errors import ConfigError, EngineUnavailable

NAMES = ["ChatKVBlend", "KVBlendLLM", "KVBlendRetriever", "KVBlendVectorStore", "PrefetchHandler"]


def test_public_names():
    assert langchain_kvblend.__all__ == NAMES
    for name in NAMES:
        assert getattr(langchain_kvblend, name).__name__ == name
        assert name in dir(langchain_kvblend)
    with pytest.raises(AttributeError, match="no attribute 'ChatKVBlendd'"):
        _ = langchain_kvblend.ChatKVBlendd


def test_it_is_typed():
    assert (Path(langchain_kvblend.__file__).parent / "py.typed").exists()


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_importing_loads_neither_torch_nor_vllm_and_takes_no_time():
    heavy = ("torch", "vllm", "transformers", "langchain_core")
    seconds, loaded = run(
        "import sys, time; start = time.process_time(); import langchain_kvblend; "
        f"print(time.process_time() - start, [name for name in {heavy} if name in sys.modules], sep=';')"
    ).split(";")
    assert float(seconds) < 1
    assert loaded.strip() == "[]"


def test_making_a_model_loads_neither_torch_nor_vllm():
    loaded = run(
        f"import sys; from langchain_kvblend import {', '.join(NAMES)}; ChatKVBlend(model='a/b'); "
        "print([name for name in ('torch', 'vllm', 'transformers') if name in sys.modules])"
    )
    assert loaded.strip() == "[]"


@pytest.mark.parametrize("kind", [ChatKVBlend, KVBlendLLM])
def test_without_vllm_one_clear_line(kind, monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "vllm" else found(name, *more))
    llm = kind(model="some/model", settings={"store_path": str(tmp_path)})
    with pytest.raises(EngineUnavailable, match=r"^vLLM is not installed: pip install 'kvblend-rag\[gpu\]'[^\n]*$"):
        llm.invoke("hi")


@pytest.mark.parametrize("kind", [ChatKVBlend, KVBlendLLM])
def test_two_models_of_one_configuration_share_one_engine(kind, monkeypatch, tmp_path):
    from kvblend_rag.testing import FakeEngine

    started = []

    def launch(config):
        started.append(FakeEngine())
        return started[-1]

    monkeypatch.setattr("kvblend_rag.kvblend._launch", launch)
    settings = {"store_path": str(tmp_path)}
    one = kind(model="m", settings=settings, temperature=0)
    two = kind(model=Path("m"), settings=settings, temperature=1, max_tokens=5)
    other = ChatKVBlend(model="m", settings=settings, engine_args={"max_model_len": 512})
    assert not started
    one.invoke("hi")
    two.invoke("hi")
    assert len(started) == 1
    other.invoke("hi")
    assert len(started) == 2
    one.close()
    two.invoke("hi")  # still there for the other
    assert len(started) == 2
    two.close()
    assert started[0].closed
    assert not started[1].closed
    one.invoke("hi")  # a later request starts anew
    assert len(started) == 3
    one.close()
    one.close()
    other.close()
    assert all(engine.closed for engine in started)


def test_closing_a_model_leaves_a_given_kv_alone(kv, engine):
    llm = ChatKVBlend(kv=kv)
    llm.invoke("hi")
    llm.close()
    assert not engine.closed
    llm.invoke("hi")


@pytest.mark.parametrize("kind", [ChatKVBlend, KVBlendLLM])
def test_what_can_not_be_meant(kind, kv, tmp_path):
    with pytest.raises(ConfigError, match=r"no argument 'temprature'. Did you mean 'temperature'?"):
        kind(model="m", temprature=0)
    with pytest.raises(ConfigError, match="engine_args"):
        kind(model="m", zzzz=0)
    with pytest.raises(ConfigError, match="Which model"):
        kind()
    with pytest.raises(ConfigError, match="Give kv, or model"):
        kind(kv=kv, model="another")
    with pytest.raises(ConfigError, match="Give kv, or model"):
        kind(kv=kv, settings={"chunk_size": 64})
    with pytest.raises(ConfigError, match="Unknown key 'chunksize'"):
        kind(model="m", settings={"chunksize": 64})
    assert kind(kv=kv, model="fake-model").model == "fake-model"


def test_configuration_from_a_file(tmp_path):
    file = tmp_path / "kvblend.yaml"
    file.write_text(f"model: from-file\nstore_path: {tmp_path}\nchunk_size: 99\n")
    llm = ChatKVBlend(config_file=file, settings={"span_size": 8})
    assert llm.model == "from-file"
    assert llm._identifying_params["settings"]["chunk_size"] == 99
    assert llm._identifying_params["settings"]["span_size"] == 8


def test_an_engine_handed_over_without_a_name(tmp_path):
    from kvblend_rag.config import BlendConfig
    from kvblend_rag.testing import FakeEngine

    with KVBlend(BlendConfig(store_path=str(tmp_path)), FakeEngine(model="handed-over")) as kv:
        llm = ChatKVBlend(kv=kv)
        assert llm.model == "handed-over"
        assert llm._identifying_params["settings"]["fingerprint"] == "fake:handed-over"


def test_the_readme_s_code(monkeypatch, tmp_path, words):
    from langchain_core.documents import Document
    from langchain_core.embeddings import DeterministicFakeEmbedding
    from langchain_core.vectorstores import InMemoryVectorStore

    from kvblend_rag.testing import FakeEngine

    store_path = tmp_path / "store"
    monkeypatch.setattr("kvblend_rag.kvblend._launch", lambda config: FakeEngine("Fine.", store_path=store_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kvblend.yaml").write_text(f"model: some/model\nstore_path: {store_path}\n")
    readme = (Path(langchain_kvblend.__file__).parents[1] / "README.md").read_text()
    names = {
        "any_vector_store": InMemoryVectorStore(DeterministicFakeEmbedding(size=8)),
        "chunks": [Document(words("ash")), Document(words("birch"))],
    }
    (code,) = [block.split("```")[0] for block in readme.split("```python\n")[1:]]
    exec(code, names)
    assert names["kv"].engine.ingested == 2
    assert names["llm"].invoke("hi").content == "Fine."
    names["kv"].close()


@pytest.mark.parametrize("kind", [ChatKVBlend, KVBlendLLM])
def test_a_server_in_place_of_an_engine(kind, monkeypatch):
    from kvblend_rag.testing import FakeEngine

    asked = []

    def connect(config, api_key):
        asked.append((config.base_url, config.model, api_key))
        return FakeEngine("From afar.")

    monkeypatch.setattr("kvblend_rag.kvblend._connect", connect)
    model = kind(model="served", base_url="http://host:8000/v1", api_key="secret-key")
    assert not asked
    answer = model.invoke("hi")
    assert getattr(answer, "content", answer) == "From afar."
    assert asked == [("http://host:8000/v1", "served", "secret-key")]
    shown = f"{model!r} {model} {model._identifying_params} {model.handle.config}"
    assert "http://host:8000/v1" in shown
    assert "secret-key" not in shown
    other = kind(model="served", base_url="http://host:8000/v1", api_key="other-key")
    assert other.handle is not model.handle
    model.close()
    other.close()
