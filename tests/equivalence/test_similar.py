"""Companions: chunks that are computed behind the one most like them (``ingest_context: similar``)."""

import numpy as np
import pytest

from kvblend_rag.blend.context import COMPANION_TOKENS, beside

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def engine(rigs):
    return rigs.get("llama", ingest_context="similar", local_device="disk")


@pytest.fixture
def rig(engine):
    """With two chunks that share half of their tokens, and one that is like neither."""
    report = engine.llm.kvblend.ingest(chunks(engine), document_ids=["0", "1", "2"], progress=False)
    assert report.computed == 3
    yield engine
    engine.llm.kvblend.release(["0", "1", "2"])


def chunks(rig):
    """Token ids."""
    first = rig.tokens(120, 1)
    return [first, np.concatenate([rig.tokens(60, 2), shuffled(first)]), rig.tokens(110, 3)]


def shuffled(tokens, seed=0):
    """Half of the tokens, so that no run of them stands in both chunks."""
    return np.random.default_rng(seed).permutation(tokens)[: len(tokens) // 2]


def behind(rig, companion):
    separator = rig.llm.kvblend.engine.tokenizer.encode("\n\n", add_special_tokens=False)
    return beside(rig.info.context, companion, separator)


@pytest.mark.parametrize(("which", "companion"), [(0, 1), (1, 0), (2, None)])
def test_behind_its_companion_reuse_alone_is_a_full_prefill(rig, which, companion):
    chunk = chunks(rig)[which]
    context = rig.info.context if companion is None else behind(rig, chunks(rig)[companion])
    rig.llm.kvblend.release({"0", "1", "2"} - {str(which)})  # a companion is found in the prompt as well, else
    prompt = np.concatenate([context, chunk, rig.tokens(40, 4)])
    (answer,) = rig.fresh([prompt], selector="none")
    assert answer.report.reused_tokens == len(chunk)
    assert answer.difference(rig.plain(prompt)) < TOLERANCE
    if companion is None:
        return
    # That is no property of the model: behind the generic document the same chunk's KV is another.
    prompt = np.concatenate([rig.info.context, chunk, rig.tokens(40, 4)])
    (approximate,) = rig.fresh([prompt], selector="none")
    known = approximate.choices.items() & rig.plain(prompt).choices.items()
    assert len(known) < len(approximate.choices), "log-probabilities of the first token agree to the last bit"


def test_everything_recomputed_is_plain(rig):
    first, second, stranger = chunks(rig)
    prompt = np.concatenate([rig.tokens(30, 5), second, stranger, rig.tokens(5, 6), first, rig.tokens(40, 7)])
    (answer,) = rig.fresh([prompt], selector="everything")
    assert answer.report.recomputed_tokens == 350
    assert answer.difference(rig.plain(prompt)) < TOLERANCE


def test_a_later_chunk_goes_with_one_that_is_stored(rig):
    first, *_ = chunks(rig)
    later = np.concatenate([shuffled(first, 1), rig.tokens(50, 8)])
    rig.llm.kvblend.ingest([later], document_ids=["later"], progress=False)
    rig.llm.kvblend.release(["0", "1", "2"])
    prompt = np.concatenate([behind(rig, first), later, rig.tokens(40, 9)])
    (answer,) = rig.fresh([prompt], selector="none")
    rig.llm.kvblend.release(["later"])
    assert answer.report.reused_tokens == len(later)
    assert answer.difference(rig.plain(prompt)) < TOLERANCE


def test_another_tenants_chunk_is_no_companion(rig):
    first, *_ = chunks(rig)
    theirs = np.concatenate([shuffled(first, 2), rig.tokens(50, 10)])
    rig.store(theirs, tenant="other")
    prompt = np.concatenate([rig.info.context, theirs, rig.tokens(40, 11)])
    (answer,) = rig.fresh([prompt], selector="none", tenant="other")
    assert answer.report.reused_tokens == len(theirs)
    assert answer.difference(rig.plain(prompt)) < TOLERANCE


@pytest.mark.parametrize("permit", [{}, {"permit": ""}, {"permit": "0" * 64}], ids=["none", "empty", "wrong"])
def test_over_http_nobody_chooses_a_companion(rig, permit):
    """What stands in front of a chunk is in its KV: who could choose it could put words into other requests."""
    chunk = rig.tokens(50, 12)
    context = behind(rig, rig.tokens(100, 13))
    ingest = {"key": rig.key(chunk), "namespace": rig.space(), "start": len(context), **permit}
    (answer,) = rig.ask([np.concatenate([context, chunk])], 1, ingest=ingest)
    assert "right behind the ingest context" in answer.report.reason
    assert rig.call("flush") == [{}]
    assert not rig.file(chunk).exists()


def test_a_permit_is_for_the_last_document_alone(rig):
    chunk, context = rig.tokens(50, 14), np.array(rig.info.context)
    context[len(context) - COMPANION_TOKENS - 1] += 1
    ingest = {"key": rig.key(chunk), "namespace": rig.space(), "start": len(context), "permit": rig.info.permit}
    (answer,) = rig.ask([np.concatenate([context, chunk])], 1, ingest=ingest)
    assert "right behind the ingest context" in answer.report.reason
    assert not rig.file(chunk).exists()


def test_the_permit_is_not_printed(rig):
    assert rig.info.permit
    assert rig.info.permit not in repr(rig.info)


@pytest.mark.full
def test_every_data_parallel_engine_takes_companions(rigs):
    """Requests go to any of them, and the first alone is asked what it is."""
    rig = rigs.get("llama", engine={"data_parallel_size": 2}, ingest_context="similar", local_device="disk")
    topic = rig.tokens(60, 20)
    several = [np.concatenate([rig.tokens(60, 30 + seed), shuffled(topic, seed)]) for seed in range(8)]
    report = rig.llm.kvblend.ingest(several, progress=False)
    assert report.computed == len(several)
