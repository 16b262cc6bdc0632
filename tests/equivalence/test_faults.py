"""A stored chunk that is missing, damaged or foreign gives the plain answer and the reason, and harms nobody else.

The engine reads from disk each time (``local_device="disk"``), so that what a test does to a file is seen.
"""

import re
import time

import numpy as np
import pytest
import torch

from kvblend_rag.store.base import StoredChunk
from kvblend_rag.store.chunk_file import encode_chunk, write_chunk
from kvblend_rag.store.layout import StoreLayout

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def rig(rigs):
    return rigs.get("llama", blocks=24, local_device="disk")


def _truncated(rig, path, _key):
    path.write_bytes(path.read_bytes()[:-1000])


def _header_only(rig, path, _key):
    path.write_bytes(path.read_bytes()[:100])


def _emptied(rig, path, _key):
    path.write_bytes(b"")


def _flip(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << 6
    path.write_bytes(raw)


def _write(path, key, kv):
    layout = StoreLayout(path.parents[2])
    token_ids = np.arange(kv.shape[2], dtype=np.int32)
    write_chunk(layout, path, encode_chunk(layout, StoredChunk(key, "another model", token_ids, kv), (0, 1)))


def _fallbacks():
    """By reason, as ``/metrics`` shows them."""
    from prometheus_client import REGISTRY, generate_latest

    line = r'^vllm:kvblend_fallbacks_total\{.*reason="(\w+)".*\} (\S+)$'
    return {reason: float(n) for reason, n in re.findall(line, generate_latest(REGISTRY).decode(), re.MULTILINE)}


FAULTS = {
    "missing": (lambda rig, path, key: path.unlink(), "is not in the store"),
    "truncated": (_truncated, "fails its checksum"),
    "cut in the header": (_header_only, "is cut short"),
    "empty": (_emptied, "is cut short"),
    "bit flipped in the keys": (lambda rig, path, key: _flip(path, 3000), "fails its checksum"),
    "bit flipped in the last byte": (lambda rig, path, key: _flip(path, -1), "fails its checksum"),
    "bit flipped in the header": (lambda rig, path, key: _flip(path, 40), "checksum"),
    "another chunk's file": (
        lambda rig, path, key: path.write_bytes(rig.file(rig.chunks[100]).read_bytes()),
        "holds chunk",
    ),
    # Written with this key and a right checksum: a digest that collides, or a store that was tampered with.
    "another model's layers": (
        lambda rig, path, key: _write(path, key, torch.zeros(6, 2, 150, 2, 32)),
        "this model needs",
    ),
    "another model's heads": (
        lambda rig, path, key: _write(path, key, torch.zeros(4, 2, 150, 8, 32)),
        "this model needs",
    ),
    "another dtype": (
        lambda rig, path, key: _write(path, key, torch.zeros(4, 2, 150, 2, 32, dtype=torch.bfloat16)),
        "this model needs",
    ),
    "fewer tokens": (lambda rig, path, key: _write(path, key, torch.zeros(4, 2, 20, 2, 32)), "this model needs"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("selector", ["none", "question"])
def test_a_faulty_chunk_gives_the_plain_answer_and_the_reason(rig, fault, selector):
    if selector == "question" and fault not in ("missing", "another model's layers"):
        pytest.skip("the selector is not reached")
    damage, why = FAULTS[fault]
    chunk = rig.tokens(150, 4000 + list(FAULTS).index(fault))
    prompt = np.concatenate([rig.tokens(20, 1), rig.chunks[60], rig.tokens(9, 2), chunk, rig.tokens(30, 3)])
    plain = rig.plain(prompt)
    rig.store(chunk)
    (whole,) = rig.fresh([prompt], selector=selector)
    assert whole.report.blended
    assert whole.token_ids != plain.token_ids or whole.difference(plain) > TOLERANCE
    damage(rig, rig.file(chunk), rig.key(chunk))
    before = _fallbacks()
    (answer,) = rig.fresh([prompt], selector=selector)
    reason = "missing" if fault == "missing" else "damaged"
    expected, end = {**before, reason: before.get(reason, 0) + 1}, time.monotonic() + 10
    while _fallbacks() != expected and time.monotonic() < end:  # an answer is out before it is counted
        time.sleep(0.05)
    assert _fallbacks() == expected
    assert answer.difference(plain) < TOLERANCE
    report = answer.report
    assert why in report.reason
    assert not report.blended
    assert (report.reused_tokens, report.recomputed_tokens, report.computed_tokens) == (0, 0, len(prompt))
    # Others in the same batch and those that follow are as if nothing had been.
    damaged, sound = rig.fresh([prompt, rig.prompt(100, 60, total=300)], selector="everything")
    assert damaged.difference(plain) < TOLERANCE
    assert sound.report.blended
    assert sound.difference(rig.plain(rig.prompt(100, 60, total=300))) < TOLERANCE
    # Ingested again, it serves again.
    rig.file(chunk).unlink(missing_ok=True)
    rig.store(chunk)
    (again,) = rig.fresh([prompt], selector=selector)
    assert again.report.blended
    assert again.token_ids == whole.token_ids
    assert np.array_equal(again.logprobs, whole.logprobs)


def test_a_chunk_that_was_found_damaged_is_not_asked_for_again(rig):
    chunk = rig.tokens(150, 5000)
    rig.store(chunk)
    prompt = np.concatenate([rig.tokens(20, 1), chunk, rig.tokens(30, 3)])
    _flip(rig.file(chunk), 3000)
    (first,) = rig.fresh([prompt], selector="none")
    (second,) = rig.fresh([prompt], selector="none")
    assert "fails its checksum" in first.report.reason
    assert "stored chunks stands in the prompt" in second.report.reason
    assert second.difference(rig.plain(prompt)) < TOLERANCE
    assert not rig.file(chunk).exists()


def test_a_fallback_leaves_nothing_behind_that_blended_requests_could_take_for_a_blend(rig):
    chunk = rig.tokens(200, 5001)
    rig.store(chunk)
    prompt = np.concatenate([rig.tokens(20, 1), chunk, rig.tokens(80, 3)])
    expected = rig.fresh([prompt], selector="none")[0]
    intact = rig.file(chunk).read_bytes()
    rig.file(chunk).unlink()
    (fallback,) = rig.fresh([prompt], selector="none")
    assert fallback.difference(rig.plain(prompt)) < TOLERANCE
    rig.file(chunk).write_bytes(intact)
    rig.store(chunk)
    (after,) = rig.ask([prompt], selector="none")
    assert after.token_ids in (expected.token_ids, fallback.token_ids)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"key": "0" * 32}, "does not belong"),
        ({"namespace": "0" * 32}, "does not belong"),
        ({"start": 0}, "does not belong"),
        ({}, "right behind the ingest context"),
    ],
    ids=["key", "namespace", "start", "context"],
)
def test_what_is_not_a_chunk_behind_the_ingest_context_is_never_stored(rig, change, why):
    """A key stands for what is in front of a chunk too; over HTTP, anybody may send an ingest request."""
    chunk, context = rig.tokens(50, 6000), list(rig.info.context)
    ingest = {"key": rig.key(chunk), "namespace": rig.space(), "start": len(context), **change}
    if not change:
        context[7] += 1
    (answer,) = rig.ask([[*context, *chunk]], 1, ingest=ingest)
    assert why in answer.report.reason
    assert rig.call("flush") == [{}]
    assert not rig.file(chunk).exists()


@pytest.mark.parametrize(
    "parameters", [{"ingest": {}}, {"ingest": 5}, {"ratio": "much"}, {"tenant": None}, "all"], ids=str
)
def test_nonsense_over_http_is_answered_plainly(rig, parameters):
    """What arrives as ``kv_transfer_params`` is not checked by us before it reaches the scheduler."""
    prompt = rig.prompt(60, total=200)
    sampling = {"extra_args": {"kv_transfer_params": {"kvblend": parameters}}}
    answer = _directly(rig, prompt, sampling)
    assert answer.report.reason
    assert not answer.report.blended
    assert answer.difference(rig.plain(prompt)) < TOLERANCE


def _directly(rig, prompt, sampling):
    """Past ``LLM``, as vLLM's own server would."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=16, temperature=0.0, logprobs=1, ignore_eos=True, **sampling)

    async def run():
        async for output in rig.engine.generate([int(token) for token in prompt], params):
            final = output
        return final

    rig.reset()
    return rig.answer(rig.engine.run(run()))


@pytest.mark.parametrize(
    ("sampling", "why"),
    [
        ({"prompt_logprobs": 1}, "prompt log-probabilities need an ordinary prefill"),
        ({"skip_reading_prefix_cache": True}, "skips the prefix cache"),
    ],
    ids=["prompt_logprobs", "skip_reading_prefix_cache"],
)
def test_requests_that_need_every_prompt_token_computed(rig, sampling, why):
    prompt = rig.prompt(100, 60, total=300)
    answer = _directly(rig, prompt, sampling)
    assert why in answer.report.reason
    assert answer.difference(rig.plain(prompt)) < TOLERANCE
