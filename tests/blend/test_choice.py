"""What is chosen is never predicted to be slower than what was left, and the reason says the numbers."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvblend_rag.blend.choice import WORTH, Tier, choose, hopeless, reading_seconds
from kvblend_rag.blend.cost import Effort, ForwardPace, Pace, ReadPace, blend_seconds, computing_seconds, plain_seconds
from kvblend_rag.blend.match import Match
from kvblend_rag.blend.plan import make_plan

MEMORY = Tier("memory", ReadPace(0.0, 0.0))
FAST = Pace(ForwardPace(0.01, 1e-3, 1e-7, 1e-4), 0.005, 1e-5, 1000)
EFFORT = Effort(0.15, 16, computed_share=0.6)


@st.composite
def cases(draw):
    tokens = draw(st.integers(40, 4000))
    edges = sorted(draw(st.sets(st.integers(0, tokens), max_size=12)))
    keys = [draw(st.sampled_from("abcdef")) for _ in edges[::2]]
    runs = [
        Match(key, start, draw(st.integers(0, 50)), stop - start)
        for key, start, stop in zip(keys, edges[::2], edges[1::2], strict=False)
    ]
    plan = make_plan(np.arange(tokens), runs).clip(draw(st.integers(0, tokens)))
    numbers = st.floats(0, 1)
    forward = ForwardPace(
        1e-4 + draw(numbers) * 0.05,
        1e-6 + draw(numbers) * 1e-3,
        draw(numbers) * 1e-7,
        draw(numbers) * 1e-4,
        512,
        32,
        draw(st.sampled_from([0.0, 0.01, 0.1])),
    )
    pace = Pace(forward, draw(numbers) * 0.05, draw(numbers) * 1e-4, 1000)
    tiers = [
        MEMORY,
        Tier("disk", ReadPace(draw(numbers) * 0.01, draw(numbers) * 1e-6)),
        Tier("s3", ReadPace(draw(numbers), draw(numbers) * 1e-6), remote=True),
        Tier("valkey", None, remote=True),
    ]
    where = {key: draw(st.sampled_from(tiers)) for key in "abcdef"}
    effort = Effort(draw(numbers), draw(st.integers(1, 64)), draw(numbers), draw(numbers))
    return plan, effort, pace, where


@settings(max_examples=300, deadline=None)
@given(cases(), st.floats(0.5, 2), st.floats(0.5, 2))
def test_the_choice_is_consistent_with_the_costs(case, plain_drift, blend_drift):
    plan, effort, pace, where = case
    choice = choose(
        plan,
        effort,
        pace,
        where.__getitem__,
        plain_drift=lambda tokens: plain_drift,
        blend_drift=lambda tokens: blend_drift,
    )

    def cost(runs):
        kept = plan.keeping(runs)
        computing = max(
            blend_drift * blend_seconds(kept, effort, pace), plain_drift * computing_seconds(kept, effort, pace)
        )
        return reading_seconds(runs, where, pace.token_bytes) + computing

    plain = plain_drift * plain_seconds(plan, pace)
    assert choice.plain == pytest.approx(plain)
    assert set(choice.plan.runs) <= set(plan.runs)
    assert choice.plan.question_range == plan.question_range
    loadable = [run for run in plan.runs if where[run.key].pace is not None]
    assert set(choice.unknown) == {where[run.key].name for run in plan.runs if where[run.key].pace is None}
    if choice.worth_it:
        assert choice.reason is None
        assert choice.blended == pytest.approx(cost(choice.plan.runs))
        assert choice.blended <= WORTH * plain
        assert choice.loading == pytest.approx(reading_seconds(choice.plan.runs, where, pace.token_bytes))
        assert all(run in loadable for run in choice.plan.runs)
    elif plan.runs:
        assert choice.reason
        assert choice.plan.runs == ()
    if loadable:
        # Loading all there is, or all of one tier, is never better than what was found best.
        assert choice.blended <= cost(loadable) + 1e-12
        for _, group in itertools.groupby(
            sorted(loadable, key=lambda run: where[run.key].name), lambda r: where[r.key].name
        ):
            assert choice.blended <= cost(list(group)) + 1e-12


def plan_of(*lengths, question=40, header=20):
    runs, start = [], header
    for index, length in enumerate(lengths):
        runs.append(Match(f"k{index}", start, 0, length))
        start += length + 1
    return make_plan(np.arange(start + question), runs)


def test_far_chunks_are_computed_and_near_ones_loaded():
    """Each millisecond computes a token: what needs half a second to come is worth it from 500 tokens on."""
    plan = plan_of(400, 400, 400)
    slow = Tier("s3", ReadPace(2.0, 0.0), remote=True)
    choice = choose(plan, EFFORT, FAST, {"k0": MEMORY, "k1": slow, "k2": MEMORY}.__getitem__)
    assert [run.key for run in choice.plan.runs] == ["k0", "k2"]
    assert choice.slow == ("k1",)
    assert choice.plan.question_range == plan.question_range
    # Several that wait together share the wait.
    quick = Tier("s3", ReadPace(0.5, 0.0), remote=True)
    choice = choose(plan, EFFORT, FAST, lambda key: quick)
    assert len(choice.plan.runs) == 3
    assert choice.loading == pytest.approx(0.5)
    single = choose(plan_of(400), EFFORT, FAST, lambda key: quick)
    assert not single.worth_it


def test_a_model_that_computes_sooner_than_it_loads_is_prefilled_plainly():
    tiny = Pace(ForwardPace(0.01, 1e-6), 0.02, 1e-6, 1000)
    choice = choose(plan_of(256, 256), EFFORT, tiny, lambda key: MEMORY)
    assert not choice.worth_it
    assert choice.reason == "loading the prompt's chunks would take longer than computing it: 47 ms against 11 ms"
    assert choice.slow == ()


def test_next_to_nothing_is_not_worth_the_risk():
    pace = Pace(ForwardPace(0.0, 1e-3), 0.0, 0.82e-3, 1000)
    choice = choose(plan_of(1000, question=20, header=0), Effort(0.15, 16), pace, lambda key: MEMORY)
    assert not choice.worth_it
    assert "would save next to nothing" in choice.reason


def test_a_tier_that_nobody_measured_is_not_waited_for():
    choice = choose(plan_of(400), EFFORT, FAST, lambda key: Tier("disk", None))
    assert choice.reason == "how fast chunks load from disk is not known yet: the prompt was computed"
    assert choice.slow == ("k0",)


def test_a_chunk_that_stands_twice_is_read_once():
    runs = [Match("a", 0, 0, 100), Match("a", 200, 50, 100)]
    tiers = {"a": Tier("disk", ReadPace(1.0, 1.0))}
    assert reading_seconds(runs, tiers, 1) == 1 + 150


@settings(max_examples=200, deadline=None)
@given(cases(), st.floats(0.5, 2), st.floats(0.5, 2))
def test_what_is_hopeless_is_never_chosen(case, plain_drift, blend_drift):
    plan, effort, pace, where = case
    drifts = {"plain_drift": lambda tokens: plain_drift, "blend_drift": lambda tokens: blend_drift}
    if hopeless(plan.prompt_tokens, effort, pace, **drifts):
        assert not choose(plan, effort, pace, where.__getitem__, **drifts).worth_it


def test_a_tiny_model_is_hopeless_and_a_large_one_is_not():
    tiny = Pace(ForwardPace(0.01, 1e-6), 0.02, 1e-6, 1000)
    reason = "no chunk could make it faster: a blend takes 47 ms at least, computing it 11 ms"
    assert hopeless(1000, EFFORT, tiny) == reason
    assert hopeless(1000, EFFORT, FAST) is None
    assert hopeless(1, EFFORT, FAST)


def test_what_is_scored_and_recomputed_counts_when_a_prompt_is_given_up_unseen():
    """50 tokens: 60 ms plainly, 28 at least where nothing is scored or recomputed, 56 as the selector does it."""
    assert hopeless(50, Effort(0.0, 16), FAST) is None
    assert hopeless(50, Effort(0.35, 16, computed_share=1.0), FAST)


@pytest.mark.parametrize("drift", [0.3, 1.0, 3.0])
def test_where_everything_is_recomputed_no_gain_is_promised_whatever_was_measured(drift):
    """Something else on the machine made vLLM's steps look slow: it would slow ours as well."""
    drifts = {"plain_drift": lambda tokens: drift, "blend_drift": lambda tokens: 0.1}
    everything = Effort(1.0, 16)
    free = Pace(ForwardPace(0.001, 1e-3, max_tokens=256), 0.0, 0.0, 1000)
    choice = choose(plan_of(400, 400), everything, free, lambda key: MEMORY, **drifts)
    assert not choice.worth_it
    assert "would save next to nothing" in choice.reason
    assert hopeless(1000, everything, free, **drifts)
    assert choose(plan_of(400, 400), Effort(0.15, 16), free, lambda key: MEMORY, **drifts).worth_it
