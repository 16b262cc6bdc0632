"""A running server in place of an engine."""

from __future__ import annotations

import pytest
from llama_index.llms.kvblend import KVBlendLLM

from kvblend_rag.errors import ConfigError
from kvblend_rag.testing import FakeEngine, fake_kvblend

URL = "http://host:8000/v1"


def test_a_server_in_place_of_an_engine(monkeypatch) -> None:
    asked = []

    def connect(config, api_key):
        asked.append((config.base_url, config.model, api_key))
        return FakeEngine("From afar.")

    monkeypatch.setattr("kvblend_rag.kvblend._connect", connect)
    llm = KVBlendLLM("served", base_url=URL, api_key="secret-key")
    assert not asked
    assert llm.complete("hi").text == "From afar."
    assert asked == [(URL, "served", "secret-key")]
    assert "secret-key" not in f"{llm!r} {llm.to_dict()} {llm.kv.config}"
    llm.close()


def test_either_a_server_or_a_handle(tmp_path) -> None:
    kv = fake_kvblend(store_path=tmp_path)
    with pytest.raises(ConfigError, match="Give either kv, or model, base_url"):
        KVBlendLLM(kv=kv, base_url=URL)
