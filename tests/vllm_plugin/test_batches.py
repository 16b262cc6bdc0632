"""Rows of a scattered forward are cut into passes that a step can take, and nothing is lost or turned round."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")

import itertools

from kvblend_rag.blend.match import ChunkIndex
from kvblend_rag.blend.plan import make_plan
from kvblend_rag.vllm_plugin.worker.blender import _joined
from kvblend_rag.vllm_plugin.worker.forward import Row, ScatteredForward

MIN_RUN = 4


@st.composite
def ranges(draw):
    edges = sorted(draw(st.sets(st.integers(0, 400), max_size=30)))
    return list(zip(edges[::2], edges[1::2], strict=False))


def passes(given_ranges, max_tokens, max_rows):
    forward = object.__new__(ScatteredForward)
    forward.max_tokens, forward.max_rows = max_tokens, max_rows
    tokens = np.arange(400, dtype=np.int32)
    blocks = np.zeros(1, np.int32)
    return [
        [(row.start, row.stop) for row in batch]
        for batch in forward._batches(Row(tokens, blocks, start, stop) for start, stop in given_ranges)
    ]


@given(ranges(), st.integers(1, 100), st.integers(1, 12))
def test_every_token_goes_through_once_in_order_and_no_pass_is_too_large(given_ranges, max_tokens, max_rows):
    batches = passes(given_ranges, max_tokens, max_rows)
    assert all(batches)
    assert all(sum(stop - start for start, stop in batch) <= max_tokens for batch in batches)
    assert all(len(batch) <= max_rows for batch in batches)
    through = [position for batch in batches for start, stop in batch for position in range(start, stop)]
    assert through == [position for start, stop in given_ranges for position in range(start, stop)]
    # No pass is made that the one before had room for.
    for one, other in itertools.pairwise(batches):
        assert len(one) == max_rows or sum(stop - start for start, stop in one) == max_tokens, other


small = st.lists(st.integers(0, 3), min_size=24, max_size=60)


@settings(max_examples=150, deadline=None)
@given(st.lists(small, min_size=1, max_size=5), st.data())
def test_random_prompts_chunk_sets_overlaps_repeats_and_splits(chunks, data):
    """Over few tokens, so that chunks overlap, repeat and stand in one another; then any plan, cut anywhere."""
    index = ChunkIndex()
    keys = {}
    for number, chunk in enumerate(chunks):
        key = f"{number:032x}"
        keys[key] = np.array(chunk, np.int32)
        index.add(key, keys[key])
    parts = data.draw(
        st.lists(st.one_of(st.sampled_from(chunks), st.lists(st.integers(0, 5), max_size=30)), min_size=1, max_size=8)
    )
    prompt = np.array([token for part in parts for token in part] or [0], np.int32)
    plan = make_plan(prompt, index.match(prompt, MIN_RUN), MIN_RUN)
    kept = data.draw(st.sets(st.sampled_from(plan.runs))) if plan.runs else set()
    for way in (plan, plan.keeping(kept), plan.keeping(kept).clip(data.draw(st.integers(0, len(prompt))), MIN_RUN)):
        for run in way.runs:
            found = keys[run.key][run.chunk_start : run.chunk_start + run.length]
            assert np.array_equal(prompt[run.start : run.stop], found)
        recomputed = sorted(data.draw(st.sets(st.sampled_from(range(len(prompt))), max_size=20)))
        spans = [(at, at + 1) for at in recomputed if any(run.start <= at < run.stop for run in way.runs)]
        together = _joined([*way.computed_ranges(), *spans])
        assert all(before[1] < after[0] for before, after in itertools.pairwise(together))
        through = [
            position
            for batch in passes(together, data.draw(st.integers(1, 64)), data.draw(st.integers(1, 8)))
            for start, stop in batch
            for position in range(start, stop)
        ]
        reused = {position for run in way.runs for position in range(run.start, run.stop)} - {at for at, _ in spans}
        assert len(through) == len(set(through))
        assert set(through) | reused | set(range(way.cached)) == set(range(len(prompt)))
        assert not set(through) & reused
        start, stop = way.question_range
        assert way.computed_ranges()[-1][0] <= start < stop == len(prompt)
        assert start >= way.cached
