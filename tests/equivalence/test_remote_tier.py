"""Engines on two hosts, here folders, that share a real Valkey server: what one ingests the other blends."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from kvblend_rag.store import open_remote
from kvblend_rag.store.sync import sync

pytestmark = pytest.mark.full

TOLERANCE = 1e-4
_spec = importlib.util.spec_from_file_location("servers", Path(__file__).parents[1] / "store" / "servers.py")
servers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(servers)


def test_a_second_host_blends_what_the_first_one_ingested(rigs, tmp_path):
    port = servers.free_port()
    settings = {"remote": (f"redis://127.0.0.1:{port}?timeout_s=2",), "blocks": 24}
    with servers.valkey_server(tmp_path / "valkey", port):
        first = rigs.get("llama", store_path=str(tmp_path / "first"), **settings)
        chunks = [first.tokens(150, 7000 + number) for number in range(3)]
        prompts = [np.concatenate([first.tokens(20, 1), chunk, first.tokens(30, 3)]) for chunk in chunks]
        first.store(*chunks)
        expected = [first.fresh([prompt], selector="question")[0] for prompt in prompts]
        plain = [first.plain(prompt) for prompt in prompts]
        assert [answer.report.chunks[0].tier for answer in expected] == ["memory"] * 3

        second = rigs.get("llama", store_path=str(tmp_path / "second"), **settings)
        config = second.llm.kvblend.config
        (unknown,) = second.fresh([prompts[0]], selector="question")
        assert "holds no chunks" in unknown.report.reason
        remote = open_remote(config)
        assert sync(config.store_path, remote).listed == 3
        (far,) = second.fresh([prompts[0]], selector="question")
        (near,) = second.fresh([prompts[0]], selector="question")
        assert [each.report.chunks[0].tier for each in (far, near)] == ["valkey", "memory"]
        for answer in (far, near):
            assert answer.report.blended
            assert answer.token_ids == expected[0].token_ids
            assert answer.difference(expected[0]) < TOLERANCE
        assert second.file(chunks[0]).exists()
        # all tokens recomputed from the other host's chunk are plain vLLM's
        (exact,) = second.fresh([prompts[1]], selector="everything")
        assert exact.report.chunks[0].tier == "valkey"
        assert exact.difference(plain[1]) < TOLERANCE
        # what is deleted there is not found here
        remote[0].delete([first.key(chunks[0])])
        assert sync(config.store_path, remote).deleted == 1
        (gone,) = second.fresh([prompts[0]], selector="question")
        assert not gone.report.blended
        assert gone.difference(plain[0]) < TOLERANCE
        for tier in remote:
            tier.close()
    # the server is stopped: what is here serves, what is there does not, and the answer is plain
    (kept,) = second.fresh([prompts[1]], selector="question")
    assert kept.report.blended
    assert kept.difference(expected[1]) < TOLERANCE
    (lost,) = second.fresh([prompts[2]], selector="question")
    assert not lost.report.blended
    assert "can't be reached" in lost.report.reason
    assert lost.difference(plain[2]) < TOLERANCE
