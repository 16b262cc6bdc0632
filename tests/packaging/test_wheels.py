"""Wheels of the three distributions, installed into a fresh environment.

What they depend on is not downloaded again: the fresh environment reads it from this one's site-packages, in which
only our own distributions must not be found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECTS = [ROOT, *sorted(path.parent for path in (ROOT / "integrations").glob("*/pyproject.toml"))]
NAMES = ["kvblend-rag", "langchain-kvblend", "llama-index-llms-kvblend"]


def run(*command: str | Path, **options: object) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "KVBLEND"))}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wheels")
    for project in PROJECTS:
        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, project)
    return {wheel.name.split("-")[0].replace("_", "-"): wheel for wheel in folder.iterdir()}


@pytest.fixture(scope="module")
def fresh(wheels, tmp_path_factory):
    """``fresh(code)``: what a script prints in the environment that the wheels were installed into."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        *wheels.values(),
    )
    (site,) = folder.glob("lib/python*/site-packages")
    # Paths in a .pth file are searched, the .pth files there (editable installs) are not read.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def script(code: str) -> str:
        return run(python, "-c", code, cwd=folder)

    script.folder, script.site = folder, site
    return script


def test_all_three_are_built(wheels):
    assert sorted(wheels) == NAMES


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only git knows which files are ours")
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_out_and_nothing_else_goes_in(wheels, name):
    project = PROJECTS[NAMES.index(name)]
    top = {"kvblend-rag": "kvblend_rag", "langchain-kvblend": "langchain_kvblend"}.get(name, "llama_index")
    ours = run("git", "ls-files", "--cached", "--others", "--exclude-standard", top, cwd=project).split()
    with zipfile.ZipFile(wheels[name]) as wheel:
        packed = [each for each in wheel.namelist() if ".dist-info/" not in each]
    assert sorted(packed) == sorted(ours)


@pytest.mark.parametrize("package", ["kvblend_rag", "langchain_kvblend", "llama_index.llms.kvblend"])
def test_importing_takes_under_a_second_and_loads_neither_torch_nor_vllm(fresh, package):
    where, seconds, loaded = json.loads(
        fresh(
            f"import sys, time, json; start = time.process_time(); import {package} as package\n"
            "took = time.process_time() - start\n"
            "print(json.dumps([package.__file__, took, [m for m in ('torch', 'vllm') if m in sys.modules]]))"
        )
    )
    assert Path(where).is_relative_to(fresh.site)
    assert seconds < 1
    assert loaded == []


@pytest.mark.parametrize("name", NAMES)
def test_what_a_wheel_asks_for_is_what_this_environment_was_tested_with(fresh, name):
    wrong = fresh(
        "from importlib.metadata import requires, version\n"
        "from packaging.requirements import Requirement\n"
        f"for line in requires({name!r}):\n"
        "    wanted = Requirement(line)\n"
        "    if wanted.marker is None or wanted.marker.evaluate({'extra': ''}):\n"
        "        if version(wanted.name) not in wanted.specifier: print(line, version(wanted.name))"
    )
    assert wrong == ""


def test_the_command(fresh):
    command = fresh.folder / "bin" / "kvblend"
    version = fresh("from importlib.metadata import version; print(version('kvblend-rag'), end='')")
    assert version in run(command, "--version", cwd=fresh.folder)
    assert "chunk_size" in run(command, "config", cwd=fresh.folder)


def test_what_the_demo_needs_is_inside(fresh):
    fresh(
        "from kvblend_rag.demo.library import load_documents\n"
        "from kvblend_rag.demo.questions import load_questions\n"
        "import kvblend_rag, pathlib\n"
        "assert len(load_documents()) >= 40 and len(load_questions()) >= 8\n"
        "adapter = pathlib.Path(kvblend_rag.__file__).parent / 'demo' / 'reader' / 'adapter.safetensors'\n"
        "assert adapter.stat().st_size > 10_000_000"
    )


def test_both_frameworks_answer(fresh):
    fresh(
        "from kvblend_rag.testing import fake_kvblend\n"
        "from langchain_kvblend import ChatKVBlend\n"
        "from llama_index.llms.kvblend import KVBlendLLM\n"
        "kv = fake_kvblend('Fine.', store_path='store')\n"
        "assert ChatKVBlend(kv=kv).invoke('hi').content == 'Fine.'\n"
        "assert KVBlendLLM(kv=kv).complete('hi').text == 'Fine.'\n"
        "kv.close()"
    )


def test_without_vllm_one_line_says_what_to_install(fresh):
    for use in (
        "from langchain_kvblend import ChatKVBlend; ChatKVBlend(model='m').invoke('hi')",
        "from llama_index.llms.kvblend import KVBlendLLM; KVBlendLLM(model='m').complete('hi')",
        "from kvblend_rag import LLM; LLM(model='m')",
    ):
        fresh(
            "import sys, importlib.util as util\n"
            "found = util.find_spec\n"
            "util.find_spec = lambda name, *more: None if name == 'vllm' else found(name, *more)\n"
            "from kvblend_rag.errors import EngineUnavailable\n"
            "try:\n"
            f"    {use}\n"
            "except EngineUnavailable as error:\n"
            '    assert str(error).startswith("vLLM is not installed: pip install \'kvblend-rag["), error\n'
            "    assert len(str(error).splitlines()) == 1\n"
            "else:\n"
            "    raise AssertionError('no error')"
        )
