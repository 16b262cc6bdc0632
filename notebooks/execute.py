"""Execute notebooks from top to bottom and store them with their outputs.

``python notebooks/execute.py [1-quickstart …]``; without names, all of them. Needs the extras docs and demo.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
TIMEOUT = 3600
"""Seconds a cell may take: generous, since a busy machine is no fault of the notebook."""


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook, run in a kernel of its own in its folder.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=TIMEOUT, kernel_name="python3", resources={"metadata": {"path": HERE}}).execute()
    return cleaned(notebook)


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what differs from machine to machine: times of execution, paths, versions of the kernel."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python", "pygments_lexer": "ipython3"},
        }
    )
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if "text" in output:
                output.text = relative(output.text)
            for kind, data in output.get("data", {}).items():
                if kind.startswith("text/") and isinstance(data, str):
                    output.data[kind] = relative(data)
    return notebook


def relative(text: str) -> str:
    """Absolute paths of this machine, shortened to their last part."""
    return re.sub(r"(?<![\w:/<.])/(?:root|home|tmp|work|usr|opt|var|Users)(?:/[\w.@+-]+)*/([\w.@+-]+)", r"…/\1", text)


def main(names: list[str]) -> None:
    """Execute and store."""
    for path in sorted(HERE.glob("*.ipynb")):
        if not names or path.stem in names:
            print(path.name, flush=True)
            nbformat.write(executed(path), path)


if __name__ == "__main__":
    main(sys.argv[1:])
