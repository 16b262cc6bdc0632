"""Sphinx settings. `sphinx-build -W --keep-going -b html docs docs/_build/html`."""

import importlib.util
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import generate  # noqa: E402

import kvblend_rag  # noqa: E402

project = "kvblend-rag"
author = "The kvblend-rag authors"
copyright = "2026, the kvblend-rag authors"
version = release = kvblend_rag.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_nb"]
exclude_patterns = ["_build", "results", "_generated/*.md"]
html_theme = "furo"
html_title = f"kvblend-rag {release}"
html_theme_options = {"source_repository": "", "navigation_with_keys": True}
pygments_style, pygments_dark_style = "tango", "monokai"

# Notebooks are executed by the tests (tests/docs/test_notebooks.py) and shown as they are stored.
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_mock_imports = [
    name
    for name in ("vllm", "langchain_core", "llama_index.core")
    if importlib.util.find_spec(name.partition(".")[0]) is None
]
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Two frameworks have a class of the same name.
suppress_warnings = ["ref.python"]

generated = HERE / "_generated"
generated.mkdir(exist_ok=True)
(generated / "configuration.md").write_text(generate.configuration(), encoding="utf-8")
(generated / "results.md").write_text(generate.results(), encoding="utf-8")
(generated / "gpu_goals.md").write_text(generate.gpu_goals(), encoding="utf-8")
(generated / "cpu_load.md").write_text(generate.cpu_load(), encoding="utf-8")
(generated / "gpu_question.md").write_text(generate.gpu_question(), encoding="utf-8")
(generated / "gpu_serving.md").write_text(generate.gpu_serving(), encoding="utf-8")
(generated / "gpu_encodings.md").write_text(generate.gpu_encodings(), encoding="utf-8")
(generated / "capacity.md").write_text(generate.capacity(), encoding="utf-8")
(generated / "encodings.md").write_text(generate.encodings(), encoding="utf-8")
(generated / "planner.md").write_text(generate.planner("cpu"), encoding="utf-8")
(generated / "planner_gpu.md").write_text(generate.planner("gpu"), encoding="utf-8")
(generated / "capacity_tiers.md").write_text(generate.capacity_tiers(), encoding="utf-8")
for notebook in sorted((HERE.parent / "notebooks").glob("*.ipynb")):
    shutil.copyfile(notebook, generated / notebook.name)


def _show_tree(app, what, name, obj, options, lines):
    """The exception tree is a drawing, not reStructuredText."""
    if name == "kvblend_rag.errors":
        start = next(index for index, line in enumerate(lines) if line.startswith("KVBlendError"))
        lines[start:] = ["::", "", *(f"    {line}" for line in lines[start:])]


def setup(app):
    app.connect("autodoc-process-docstring", _show_tree)
