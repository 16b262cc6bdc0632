"""Fenced code blocks of the README and the docs, and engines to run them on."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "api").glob("*.md")])
_FENCE = re.compile(r"^(?P<fence>`{3,})(?P<language>[^\n]*)\n(?P<code>.*?)^(?P=fence)\s*$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    code: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text[: found.start()].count("\n") + 1, found["language"].strip(), found["code"])
        for found in _FENCE.finditer(text)
    ]


@pytest.fixture(scope="session")
def pages() -> dict[Path, list[Block]]:
    """Every page, with its blocks."""
    return {page: blocks(page) for page in PAGES}


@pytest.fixture
def own_handles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``close_engine()`` on a page closes what the page opened, and not the engines of other tests."""
    from kvblend_rag import kvblend

    handles: weakref.WeakSet[Any] = weakref.WeakSet()
    monkeypatch.setattr(kvblend, "_open_handles", handles)
    yield
    for handle in list(handles):
        handle.close()


@pytest.fixture
def scripted(own_handles: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Engines start at once and answer by a script; chunks are stored and found as ever."""
    from kvblend_rag import kvblend
    from kvblend_rag.conversation.sampling import Sampling
    from kvblend_rag.testing import FakeEngine
    from kvblend_rag.testing.script import FakeParams

    class Scripted(FakeEngine):
        def generate(self, prompt: Any, sampling_params: Any = None, **options: Any) -> Any:
            if sampling_params is not None and not isinstance(sampling_params, FakeParams):
                sampling_params = FakeParams(settings=Sampling(max_tokens=sampling_params.max_tokens), kind="final")
            return super().generate(prompt, sampling_params, **options)

    monkeypatch.setenv("KVBLEND_STORE_PATH", str(tmp_path / "store"))
    monkeypatch.setattr(
        kvblend,
        "_launch",
        lambda config: Scripted("An answer.", store_path=config.store_path, max_model_len=200_000, model=config.model),
    )


@pytest.fixture
def real(own_handles: None, monkeypatch: pytest.MonkeyPatch, reader_llm: Any) -> None:
    """Every page's engine is the bundled reader, which the page can't close."""
    from kvblend_rag import kvblend

    engine = reader_llm.kvblend.engine
    monkeypatch.setenv("KVBLEND_STORE_PATH", reader_llm.kvblend.config.store_path)
    monkeypatch.setattr(engine, "close", lambda: None)
    monkeypatch.setattr(kvblend, "_launch", lambda config: engine)
