"""Every public name is documented."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
API = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))


@pytest.mark.parametrize(
    "module", ["kvblend_rag", "kvblend_rag.testing", "langchain_kvblend", "llama_index.llms.kvblend"]
)
def test_public_names_are_in_the_reference(module: str) -> None:
    public = importlib.import_module(module)
    left_out = {"SamplingParams", "PlainTurn"}  # vLLM's own; the scripted engine's turn
    listed = {line.rpartition(".")[2].strip() for line in API.splitlines() if ":: " in line}
    assert set(public.__all__) - left_out <= listed


def test_errors_are_all_in_the_tree_that_is_shown() -> None:
    from kvblend_rag import errors

    assert errors.__doc__
    for name in errors.__all__:
        if inspect.isclass(getattr(errors, name)) and not issubclass(getattr(errors, name), Warning):
            assert name in errors.__doc__


def test_public_names_have_docstrings() -> None:
    import kvblend_rag

    for name in kvblend_rag.__all__:
        assert inspect.getdoc(getattr(kvblend_rag, name)), name
