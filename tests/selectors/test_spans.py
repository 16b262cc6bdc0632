import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvblend_rag.selectors.spans import choose_spans, mask_to_ranges, offsets_in_run


def runs_of(lengths):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))


def expected(scores, lengths, budget, span):
    """The definition, one span after the other."""
    spans, start = [], 0
    for length in lengths:
        spans += [(a, min(a + span, start + length)) for a in range(start, start + length, span)]
        start += length
    mask = [False] * start
    for a, b in sorted(spans, key=lambda s: -sum(scores[s[0] : s[1]]) / (s[1] - s[0])):
        for token in range(a, b):
            if budget > 0:
                mask[token], budget = True, budget - 1
    return mask


@given(st.lists(st.integers(1, 40), max_size=6), st.integers(0, 150), st.integers(1, 20), st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_spans_are_chosen_as_defined(lengths, budget, span, seed):
    run = runs_of(lengths)
    # whole numbers: the means of equal spans are equal, and ties are tried too
    scores = torch.randint(0, 9, (len(run),), generator=torch.Generator().manual_seed(seed)).float()
    mask = choose_spans(scores, run, budget, span)
    assert mask.dtype == torch.bool
    assert int(mask.sum()) == min(budget, len(run))
    if 0 < budget < len(run):
        assert mask.tolist() == expected(scores.tolist(), lengths, budget, span)


@given(st.lists(st.integers(1, 40), max_size=6))
def test_offsets_in_run(lengths):
    assert offsets_in_run(runs_of(lengths)).tolist() == [i for length in lengths for i in range(length)]


@given(st.lists(st.tuples(st.integers(0, 60), st.booleans()), unique_by=lambda pair: pair[0]))
def test_ranges_are_the_chosen_positions(pairs):
    pairs = sorted(pairs)
    positions = torch.tensor([position for position, _ in pairs], dtype=torch.int64)
    mask = torch.tensor([chosen for _, chosen in pairs], dtype=torch.bool)
    ranges = mask_to_ranges(positions, mask)
    assert [p for start, stop in ranges for p in range(start, stop)] == [p for p, chosen in pairs if chosen]
    assert all(one[1] < other[0] for one, other in itertools.pairwise(ranges))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_broken_scores_are_not_preferred(bad):
    scores = torch.ones(64)
    scores[:16] = bad
    mask = choose_spans(scores, runs_of([64]), 48, 16)
    assert mask.tolist() == [False] * 16 + [True] * 48
