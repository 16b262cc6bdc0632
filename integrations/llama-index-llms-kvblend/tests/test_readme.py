"""The README's code runs as it stands."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from llama_index.core import Settings
from llama_index.core.vector_stores import SimpleVectorStore

from kvblend_rag import KVBlend

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_readme(kv_of, documents, monkeypatch, capsys) -> None:
    kv = kv_of("It turns.", max_model_len=16_384)
    monkeypatch.setattr(KVBlend, "from_config", classmethod(lambda cls, path: kv))
    names = {"any_vector_store": SimpleVectorStore(), "documents": documents[:6]}
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```", README, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 3
    for _, block in blocks:
        exec(textwrap.dedent(block), names)
    shown = capsys.readouterr().out
    assert "It turns." in shown
    assert " fully " in shown
    assert names["kv"] is kv
    assert Settings.tokenizer("It turns.") == kv.engine.tokenizer.encode("It turns.")
