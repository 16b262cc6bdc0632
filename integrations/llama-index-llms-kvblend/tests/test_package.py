from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import llama_index.llms.kvblend as package
import pytest
from llama_index.llms.kvblend import KVBlendLLM

from kvblend_rag.errors import ConfigError, EngineUnavailable, RequestTimeout

ROOT = Path(__file__).parents[1]


def test_all_names_exist_and_no_class_is_left_out() -> None:
    for name in package.__all__:
        assert getattr(package, name) is not None
    for module in ("base", "postprocessor", "transform", "vector_store", "found", "messages", "nodes"):
        loaded = importlib.import_module(f"llama_index.llms.kvblend.{module}")
        assert all(hasattr(loaded, name) for name in loaded.__all__)
    assert (Path(package.__file__).parent / "py.typed").exists()


def test_llama_index_stays_a_namespace() -> None:
    assert not list((ROOT / "llama_index").glob("__init__.py"))
    assert not list((ROOT / "llama_index/llms").glob("__init__.py"))


def test_llamahub_knows_every_class() -> None:
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    hub = settings["tool"]["llamahub"]
    assert hub["import_path"] == "llama_index.llms.kvblend"
    assert set(hub["class_authors"]) == {name for name in package.__all__ if name[0] == "K"}
    assert settings["project"]["version"] == package.__version__


def test_importing_loads_neither_torch_nor_vllm_and_takes_under_a_second() -> None:
    script = (
        "import sys, time\n"
        "began = time.process_time()\n"
        "import llama_index.llms.kvblend\n"
        "took = time.process_time() - began\n"
        "loaded = [name for name in ('torch', 'vllm', 'transformers', 'llama_index.core') if name in sys.modules]\n"
        "assert not loaded, loaded\n"
        "assert took < 1, took"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_making_a_model_adds_under_a_second_to_what_llama_index_takes_itself() -> None:
    script = (
        "import sys, time, llama_index.core, llama_index.core.llms.function_calling\n"
        "began = time.process_time()\n"
        "from llama_index.llms.kvblend import KVBlendLLM\n"
        "KVBlendLLM(model='nowhere')\n"
        "took = time.process_time() - began\n"
        "loaded = [name for name in ('torch', 'vllm', 'transformers') if name in sys.modules]\n"
        "assert not loaded, loaded\n"
        "assert took < 1, took"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_without_vllm_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    llm = KVBlendLLM(model=str(tmp_path), settings={"store_path": str(tmp_path / "store")})
    with pytest.raises(EngineUnavailable) as caught:
        llm.complete("Hello")
    assert "pip install 'kvblend-rag[" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_models_of_one_configuration_share_one_engine(tmp_path: Path) -> None:
    settings = {"store_path": str(tmp_path)}
    one = KVBlendLLM(model="same", settings=settings, temperature=0)
    two = KVBlendLLM("same", settings=settings, temperature=1)
    other = KVBlendLLM(model="same", settings=settings, engine_args={"max_model_len": 512})
    assert one.kv is two.kv
    assert one.kv is not other.kv
    assert not one.kv.started
    handle = one.kv
    one.close()
    assert not handle.closed
    two.close()
    assert handle.closed
    other.close()


def test_a_file_names_the_model(tmp_path: Path) -> None:
    file = tmp_path / "kvblend.yaml"
    file.write_text("model: from-a-file\nchunk_size: 128\n")
    llm = KVBlendLLM(config_file=file)
    assert llm.model == "from-a-file"
    assert llm.kv.config.chunk_size == 128
    llm.close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "Which model"),
        ({"model": "m", "settings": {"chunk_sise": 1}}, "chunk_size"),
    ],
)
def test_what_can_not_be_used_is_named(arguments: dict, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVBLEND_MODEL", raising=False)
    with pytest.raises(ConfigError, match=words):
        KVBlendLLM(**arguments)


def test_kv_and_model_exclude_one_another(kv_of) -> None:
    with pytest.raises(ConfigError, match="either"):
        KVBlendLLM(model="m", kv=kv_of())


def test_fields_that_are_set_later_count(kv_of) -> None:
    llm = KVBlendLLM(kv=kv_of("A long answer.", delay=0.05))
    assert llm.complete("a").text == "A long answer."
    copy = llm.model_copy(update={"timeout": 0.01})
    with pytest.raises(RequestTimeout):
        copy.complete("a")
    llm.timeout = 0.01
    with pytest.raises(RequestTimeout):
        llm.complete("a")
