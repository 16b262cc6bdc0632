"""Every code block of the README and the docs is run, or parsed where running it needs a server or a day."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "api").glob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
RUNNABLE = [name for name in NAMES if "```python" in (ROOT / name).read_text(encoding="utf-8")]
KNOWN = {"python", "console", "bash", "yaml", "toml", "json", "text"}


def of(pages: Any, name: str, *languages: str) -> list[Any]:
    return [block for block in pages[ROOT / name] if block.language in languages]


@pytest.mark.parametrize("name", NAMES)
def test_every_block_is_of_a_kind_that_is_tested(pages: Any, name: str) -> None:
    for block in pages[ROOT / name]:
        assert block.language.startswith("{") or block.language in KNOWN, block.place


@pytest.fixture
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the README's five lines take for granted."""
    core = pytest.importorskip("llama_index.core")
    from langchain_core.embeddings import DeterministicFakeEmbedding
    from langchain_core.vectorstores import InMemoryVectorStore
    from llama_index.core.vector_stores import SimpleVectorStore

    monkeypatch.chdir(ROOT)
    settings = core.Settings
    before = {name: getattr(settings, name) for name in ("_llm", "_embed_model", "_tokenizer", "_prompt_helper")}
    settings.embed_model = core.MockEmbedding(embed_dim=8)
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    yield {
        "__name__": "page",
        "any_vector_store": InMemoryVectorStore(DeterministicFakeEmbedding(size=8)),
        "any_llama_index_vector_store": SimpleVectorStore(),
        "docs": [core.Document(text=text, doc_id="contributing")],
    }
    for name, value in before.items():
        setattr(settings, name, value)


def run(pages: Any, name: str, namespace: dict[str, Any]) -> None:
    """A page's blocks one after the other, as a reader would."""
    for block in of(pages, name, "python"):
        exec(compile("\n" * block.line + block.code, str(block.page), "exec"), namespace)


@pytest.mark.parametrize("name", RUNNABLE)
def test_python_runs(pages: Any, name: str, scripted: None, surroundings: dict[str, Any]) -> None:
    run(pages, name, surroundings)


@pytest.mark.full
@pytest.mark.parametrize("name", RUNNABLE)
def test_python_runs_on_the_reader(pages: Any, name: str, real: None, surroundings: dict[str, Any]) -> None:
    run(pages, name, surroundings)


@pytest.mark.parametrize("name", NAMES)
def test_commands_exist(pages: Any, name: str) -> None:
    """Command lines are parsed by the real parser, targets looked up in the Makefile, variables among the settings."""
    from kvblend_rag.cli import parse
    from kvblend_rag.config import BlendConfig

    settings = {f"KVBLEND_{field.name.upper()}" for field in dataclasses.fields(BlendConfig)}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for block in of(pages, name, "console"):
        for line in block.code.splitlines():
            assert line.startswith("$ "), f"{block.place}: {line}"
            words = shlex.split(line.removeprefix("$ "))
            given = [word.partition("=")[0] for word in itertools.takewhile(lambda word: "=" in word, words)]
            assert settings.issuperset(given), f"{block.place}: {line}"
            program, *arguments = words[len(given) :]
            if program == "kvblend":
                parse(arguments)
            elif program == "make":
                assert arguments[0] in targets, f"{block.place}: {line}"
            elif program == "python":
                script = f"{arguments[1].replace('.', '/')}.py" if arguments[0] == "-m" else arguments[0]
                assert (ROOT / script).exists(), f"{block.place}: {line}"
            else:
                assert program in ("pip", "sphinx-build"), f"{block.place}: {line}"


@pytest.mark.parametrize("name", NAMES)
def test_shell_parses_and_serving_flags_are_ours(pages: Any, name: str) -> None:
    from kvblend_rag.config import BlendConfig

    for block in of(pages, name, "bash"):
        subprocess.run(["bash", "-n"], input=block.code, text=True, check=True)
        words = shlex.split(block.code.replace("\\\n", " "))
        if "--kv-transfer-config" in words:
            launch = pytest.importorskip("kvblend_rag.vllm_plugin.launch")
            transfer = json.loads(words[words.index("--kv-transfer-config") + 1])
            assert transfer["kv_connector"] == launch.CONNECTOR
            assert transfer["kv_connector_module_path"] == launch.CONNECTOR_MODULE
            assert words[words.index("--worker-cls") + 1] == launch.WORKER_CLASS
            BlendConfig.load(**transfer["kv_connector_extra_config"])


@pytest.mark.parametrize("name", NAMES)
def test_settings_load(pages: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvblend_rag.config import BlendConfig

    for variable in [each for each in os.environ if each.startswith("KVBLEND_")]:
        monkeypatch.delenv(variable)
    for block in of(pages, name, "yaml"):
        file = tmp_path / "kvblend.yaml"
        file.write_text(block.code, encoding="utf-8")
        loaded = json.loads(json.dumps(BlendConfig.load(file).to_dict()))
        assert {key: loaded[key] for key in yaml.safe_load(block.code)} == yaml.safe_load(block.code), block.place
    for block in of(pages, name, "json"):
        options = json.loads(block.code).get("kv_transfer_params", {}).get("kvblend", {})
        BlendConfig().for_request(options)
    for block in of(pages, name, "toml"):
        tomllib.loads(block.code)


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{name} links to {target}"
