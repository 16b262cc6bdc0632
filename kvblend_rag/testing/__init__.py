"""What software built on kvblend is tested against: an engine that answers by a script, and needs no vLLM.

``FakeEngine`` is the engine, ``WordTokenizer`` the tokenizer it has unless given a real one (``trained_tokenizer``
makes one), ``fake_kvblend`` puts both behind a ``KVBlend``.
"""

from __future__ import annotations

from kvblend_rag.testing.engine import FakeEngine, FakeRequest, fake_kvblend
from kvblend_rag.testing.plain import PlainTurn
from kvblend_rag.testing.tokenizer import WordTokenizer
from kvblend_rag.testing.trained import trained_tokenizer

__all__ = ["FakeEngine", "FakeRequest", "PlainTurn", "WordTokenizer", "fake_kvblend", "trained_tokenizer"]
