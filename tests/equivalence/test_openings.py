"""Openings: chunks that are computed behind the header as well, for prompts in which they stand first."""

from pathlib import Path

import numpy as np
import pytest

from kvblend_rag.blend.chunk import chunk_key, namespace
from kvblend_rag.document_use import which_found
from kvblend_rag.store.layout import StoreLayout

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def rig(rigs):
    rig = rigs.get("llama", ingest_openings=True, local_device="disk")
    report = rig.llm.kvblend.ingest(chunks(rig), document_ids=["one", "two"], progress=False)
    assert (report.chunks, report.computed) == (4, 4)
    assert report.keys == tuple((rig.key(chunk), opening(rig, chunk)) for chunk in chunks(rig))
    return rig


def chunks(rig):
    return [rig.tokens(120, 1), rig.tokens(90, 2)]


def opening(rig, chunk):
    return chunk_key(namespace(rig.info.fingerprint, rig.info.header), chunk)


def used(answer):
    return [chunk.key for chunk in answer.report.chunks]


def test_behind_the_header_reuse_alone_is_a_full_prefill(rig):
    first, second = chunks(rig)
    prompt = np.concatenate([rig.info.header, first, rig.tokens(40, 3)])
    (answer,) = rig.fresh([prompt], selector="none")
    assert used(answer) == [opening(rig, first)]
    assert (answer.report.reused_tokens, answer.report.recomputed_tokens) == (120, 0)
    assert answer.difference(rig.plain(prompt)) < TOLERANCE
    # That is no property of the model: out of the ingest context's KV the answer differs.
    later = np.concatenate([rig.info.header, second, rig.tokens(1, 4), first, rig.tokens(40, 3)])
    (approximate,) = rig.fresh([later], selector="none")
    assert used(approximate) == [opening(rig, second), rig.key(first)]
    known = approximate.choices.items() & rig.plain(later).choices.items()
    assert len(known) < len(approximate.choices), "log-probabilities of the first token agree to the last bit"


@pytest.mark.parametrize("selector", ["first", "deviation", "question"])
def test_the_budget_goes_to_the_other_chunks(rig, selector):
    first, second = chunks(rig)
    prompt = np.concatenate([rig.info.header, first, rig.tokens(1, 4), second, rig.tokens(40, 3)])
    (answer,) = rig.fresh([prompt], selector=selector, ratio=0.25)
    assert used(answer) == [opening(rig, first), rig.key(second)]
    assert answer.report.recomputed_tokens == 210 // 4
    # With enough for all of the second chunk, everything that is not exact is computed again.
    (exact,) = rig.fresh([prompt], selector=selector, ratio=0.5)
    assert (exact.report.reused_tokens, exact.report.recomputed_tokens) == (120, 90)
    assert exact.difference(rig.plain(prompt)) < TOLERANCE


def test_a_document_is_found_whichever_of_its_two_is_loaded(rig):
    first, second = chunks(rig)
    prompt = np.concatenate([rig.info.header, first, rig.tokens(1, 4), second, rig.tokens(40, 3)])
    (answer,) = rig.fresh([prompt], selector="none")
    found = which_found(rig.llm.kvblend, answer.report, [first, second], prompt)
    assert [(use.found, use.reused, use.reason) for use in found] == [("fully", 120, None), ("fully", 90, None)]


def test_an_adaptive_budget_that_gives_up_computes_everything(rig):
    first, second = chunks(rig)
    prompt = np.concatenate([rig.info.header, first, rig.tokens(1, 4), second, rig.tokens(40, 3)])
    (answer,) = rig.fresh([prompt], selector="question", ratio=1.0, coverage=0.99, full_prefill_share=0.05)
    assert "everything was computed" in answer.report.reason
    assert answer.difference(rig.plain(prompt)) < TOLERANCE


def test_with_everything_recomputed_no_stored_kv_counts(rig):
    first, second = chunks(rig)
    prompt = np.concatenate([rig.info.header, first, rig.tokens(1, 4), second, rig.tokens(40, 3)])
    (answer,) = rig.fresh([prompt], selector="everything")
    assert used(answer) == [rig.key(first), rig.key(second)]
    assert answer.report.recomputed_tokens == 210
    assert answer.difference(rig.plain(prompt)) < TOLERANCE


def test_behind_another_preamble_it_is_one_of_the_approximate(rig):
    first, _ = chunks(rig)
    prompt = np.concatenate([rig.tokens(70, 5), first, rig.tokens(40, 3)])
    (answer,) = rig.fresh([prompt], selector="first", ratio=0.5)
    assert used(answer) == [opening(rig, first)]
    assert answer.report.recomputed_tokens == 60
    far = np.concatenate([rig.tokens(400, 6), first, rig.tokens(40, 3)])
    (behind,) = rig.fresh([far], selector="first")
    assert used(behind) == [rig.key(first)]
    # Rotated to where it stands: with all of it recomputed the answer is plain's, and the part in front was kept.
    (exact,) = rig.fresh([prompt], selector="first", ratio=1.0)
    assert exact.difference(rig.plain(prompt)) < TOLERANCE


def test_a_part_of_it_in_the_prefix_cache(rig):
    first, second = chunks(rig)
    prompt = np.concatenate([rig.info.header, first, rig.tokens(1, 4), second, rig.tokens(40, 3)])
    rig.reset()
    rig.ask([prompt[:130]], blend=False)  # one block of 128
    (answer,) = rig.ask([prompt], selector="question", ratio=1.0)
    assert answer.report.cached_tokens == 128
    assert (answer.report.reused_tokens, answer.report.recomputed_tokens) == (len(rig.info.header) + 120 - 128, 90)
    assert answer.difference(rig.plain(prompt)) < TOLERANCE


def test_a_lost_one_is_an_ordinary_prefill_and_deleting_takes_both(rig):
    first, second = chunks(rig)
    prompt = np.concatenate([rig.info.header, first, rig.tokens(40, 3)])
    catalogue = rig.llm.kvblend.catalogue
    both = [rig.key(second), opening(rig, second)]
    assert not catalogue.missing(both)
    assert rig.llm.kvblend.release(["two"]) == 2
    assert sorted(catalogue.missing(both)) == sorted(both)
    StoreLayout(Path(rig.llm.kvblend.config.store_path)).chunk_path(opening(rig, first), (0, 1)).unlink()
    (answer,) = rig.fresh([prompt], selector="none")
    assert opening(rig, first) in answer.report.reason
    assert answer.difference(rig.plain(prompt)) < TOLERANCE
