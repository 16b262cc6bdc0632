"""The notebooks run from top to bottom, and are stored with their outputs."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="the docs extra is not installed")
pytest.importorskip("nbclient", reason="the docs extra is not installed")

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MACHINE = re.compile(r"(?<![\w:/<.])/(?:root|home|tmp|work|usr|opt|Users)/\w")


def outputs(notebook: Any) -> str:
    parts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            parts.append(output.get("text", ""))
            parts += [data for kind, data in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join(parts)


def executed(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("execute_notebooks", FOLDER / "execute.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.executed(path)


def test_there_are_five() -> None:
    assert [path.stem[0] for path in NOTEBOOKS] == list("12345")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_with_outputs_and_without_traces_of_a_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run notebooks/execute.py"
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert not any(output.get("name") == "stderr" for cell in code for output in cell.outputs)
    assert any(cell.outputs for cell in code)
    assert not MACHINE.search(outputs(notebook))


@pytest.mark.timeout(1800)
def test_quickstart_runs() -> None:
    pytest.importorskip("vllm")
    shown = outputs(executed(FOLDER / "1-quickstart.ipynb"))
    assert "5 computed, 0 already stored" in shown
    assert "0 computed, 5 already stored" in shown
    assert "35" in shown
    assert "the request asked for an ordinary prefill" in shown


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("path", NOTEBOOKS[1:], ids=lambda path: path.stem)
def test_runs(path: Path) -> None:
    pytest.importorskip("vllm")
    executed(path)
