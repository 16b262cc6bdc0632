"""Two engines at work on one store at the same time: what one ingests or deletes, the other sees."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytestmark = [pytest.mark.full, pytest.mark.timeout(1200)]

TOLERANCE = 1e-4
SETTINGS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1536, "kv_cache_memory_bytes": 1 << 28}


@pytest.fixture(scope="module")
def rig(rigs):
    return rigs.get("llama")


@pytest.fixture(scope="module")
def other(rig, rigs):
    from kvblend_rag import LLM

    with LLM(str(rigs.model("llama")), config=rig.llm.kvblend.config, **SETTINGS) as llm:
        yield type(rig)(llm, "llama")


def test_they_serve_one_another(rig, other):
    assert other.info.fingerprint == rig.info.fingerprint
    texts = [rig.tokens(100 + number, 700 + number) for number in range(24)]
    shared = texts[8:16]  # both ingest these, at the same time
    names = [f"t{number}" for number in range(24)]
    with ThreadPoolExecutor(2) as both:
        mine = both.submit(rig.llm.kvblend.ingest, texts[:16], document_ids=names[:16], progress=False)
        theirs = both.submit(other.llm.kvblend.ingest, texts[8:], document_ids=names[8:], progress=False)
        assert mine.result().chunks == theirs.result().chunks == 16
    assert rig.llm.kvblend.catalogue.missing([rig.key(text) for text in texts]) == []
    prompts = [
        np.concatenate([rig.tokens(20, 1), texts[first], rig.tokens(1, 2), texts[last], rig.tokens(30, 3)])
        for first, last in ((0, 23), (9, 4), (20, 12))
    ]
    plain = [rig.plain(prompt) for prompt in prompts]
    with ThreadPoolExecutor(2) as both:
        asked = [both.submit(each.fresh, prompts, selector="everything") for each in (rig, other)]
    for found in asked:
        for answer, expected in zip(found.result(), plain, strict=True):
            assert len(answer.report.chunks) == 2
            assert answer.difference(expected) < TOLERANCE
    (here,), (there,) = (each.fresh([prompts[0]], selector="none") for each in (rig, other))
    assert here.report.reused_tokens == there.report.reused_tokens == len(texts[0]) + len(texts[23])
    assert here.difference(there) < TOLERANCE
    # Both hold the shared ones: they stay until the last holder lets go.
    assert rig.llm.kvblend.release(names[:8]) == 8
    (after,) = other.fresh([prompts[0]], selector="everything")
    assert [chunk.key for chunk in after.report.chunks] == [rig.key(texts[23])]
    assert rig.llm.kvblend.catalogue.missing([rig.key(text) for text in shared]) == []
