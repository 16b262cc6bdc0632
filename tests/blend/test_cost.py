"""Costs by hand, and the pace that measured passes tell."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvblend_rag.blend.cost import (
    Effort,
    ForwardPace,
    Pace,
    ReadPace,
    Work,
    blend_seconds,
    blend_work,
    fit_nonnegative,
    plain_seconds,
)
from kvblend_rag.blend.drift import Drift
from kvblend_rag.blend.match import Match
from kvblend_rag.blend.plan import make_plan
from kvblend_rag.blend.readings import Readings


def test_work_counts_the_keys_that_queries_see():
    ranges = [(0, 3), (10, 12), (5, 5)]
    seen = sum(position + 1 for start, stop in ranges for position in range(start, stop))
    assert Work.of(ranges) == Work(5, seen, 2)


def test_a_forward_takes_as_many_passes_as_it_must():
    pace = ForwardPace(fixed=1.0, token=0.1, pair=0.01, row=0.5, max_tokens=10, max_rows=2)
    assert pace.seconds(Work()) == 0
    assert pace.seconds(Work(10, 7, 1)) == pytest.approx(1 + 1 + 0.07 + 0.5)
    assert pace.seconds(Work(11, 0, 1)) == pytest.approx(2 + 1.1 + 0.5)
    assert pace.seconds(Work(3, 0, 5)) == pytest.approx(3 + 0.3 + 2.5)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_the_fit_finds_what_made_the_samples(parts):
    made = ForwardPace(*(0.001 + part * scale for part, scale in zip(parts, (1, 1e-2, 1e-5, 1e-3), strict=True)))
    works = [Work(16, 136, 1), Work(512, 131_328, 1), Work(512, 900_000, 1), Work(512, 450_000, 32), Work(64, 2080, 4)]
    found = ForwardPace.fit([(work, made.seconds(work)) for work in works])
    for work in [*works, Work(2048, 2_000_000, 8)]:
        assert found.seconds(work) == pytest.approx(made.seconds(work), rel=1e-3)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(1, 1e3), st.floats(1e-6, 10)), min_size=1, max_size=8))
def test_no_part_of_a_pace_is_negative_whatever_was_measured(samples):
    found = ForwardPace.fit([(Work(tokens, tokens**2, 1), seconds) for tokens, seconds in samples])
    assert min(found.fixed, found.token, found.pair, found.row) >= 0
    assert found.seconds(Work(100, 1e4, 1)) > 0
    with pytest.raises(ValueError, match="No forward pass"):
        ForwardPace.fit([])


def test_the_fit_is_the_best_one_that_is_not_negative():
    """The conditions of Karush, Kuhn and Tucker: no step that is allowed makes the error smaller."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        features, seconds = rng.random((6, 3)), rng.random(6) + 0.01
        scaled = features / seconds[:, None]
        found = np.array(fit_nonnegative(features, seconds))
        slope = scaled.T @ (scaled @ found - 1)
        assert (found >= 0).all()
        assert (slope >= -1e-6 * abs(scaled).max()).all()
        assert slope[found > 0] == pytest.approx(0, abs=1e-6 * abs(scaled).max())


PACE = Pace(
    ForwardPace(fixed=0.01, token=1e-3, pair=1e-7, row=1e-4, max_tokens=512, max_rows=64),
    blend=0.005,
    placed=1e-5,
    token_bytes=1000,
)


def test_a_blend_by_hand():
    plan = make_plan(np.arange(1000), [Match("a", 100, 0, 400), Match("b", 500, 0, 400)])
    effort = Effort(ratio=0.1, span=16, computed_share=0.5)
    computed, last = Work.of([(0, 100), (900, 1000)]), Work.of([(999, 1000)])
    again = Work(80, 40 * 300.5 + 40 * 700.5, 5)
    expected = (
        0.005
        + 800e-5
        + 0.5 * PACE.forward.seconds(computed)
        + PACE.forward.seconds(computed + again)
        + PACE.forward.seconds(last)
    )
    assert blend_seconds(plan, effort, PACE) == pytest.approx(expected)
    assert blend_work(plan, effort).tokens == pytest.approx(200 + 80 + 100)
    assert blend_work(plan, Effort(0.1, 16, whole_share=0.2)).tokens == pytest.approx(200 + 80 + 200)
    assert plain_seconds(plan, PACE) == pytest.approx(PACE.forward.seconds(Work.of([(0, 1000)])))
    assert plain_seconds(plan.clip(600), PACE) == pytest.approx(PACE.forward.seconds(Work.of([(600, 1000)])))


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0, 1))
def test_recomputing_more_costs_more(one, other):
    plan = make_plan(np.arange(1000), [Match("a", 100, 0, 800)])
    low, high = (blend_seconds(plan, Effort(ratio, 16), PACE) for ratio in sorted((one, other)))
    assert low <= high


def test_readings_tell_a_wait_from_a_rate_and_follow_a_change():
    readings = Readings()
    assert readings.pace() is None
    readings.observe(1, 10**6, 0.2 + 0.01)
    readings.observe(1, 4 * 10**6, 0.2 + 0.04)
    pace = readings.pace()
    assert (pace.read, pace.byte) == pytest.approx((0.2, 1e-8))
    for size in range(1, 13):
        readings.observe(1, size * 10**6, size * 0.1)
    assert readings.pace().seconds(1, 10**6) == pytest.approx(0.1, rel=0.25)
    assert ReadPace(0.5, 1e-3).seconds(2, 1000) == 2


def test_drift_follows_what_is_measured_by_size():
    drift = Drift()
    assert drift.factor(100) == 1
    drift.observe(2000, 1.0, 3.0)
    drift.observe(2000, 1.0, 3.0)
    assert drift.factor(2000) == 3
    assert drift.factor(5) == 3  # nothing nearer is known
    drift.observe(5, 1.0, 0.5)
    drift.observe(5, 1.0, 0.5)
    assert (drift.factor(5), drift.factor(2000)) == (0.5, 3)
    for _ in range(3):
        drift.observe(2000, 1.0, 0.9)
    assert drift.factor(2000) == 0.9
    drift.observe(2000, 0.0, 1.0)
    for _ in range(2):
        drift.observe(2000, 1.0, 4.0)
    assert drift.factor(2000) == 0.9
    drift.observe(2000, 1.0, 4.0)
    assert drift.factor(2000) == 4
    for _ in range(200):
        drift.forget(2000)
    assert drift.factor(2000) == pytest.approx(1, abs=0.06)
    assert drift.factor(5) == 0.5  # short prompts are left alone for other reasons


def test_one_hiccup_is_no_drift():
    drift = Drift()
    drift.observe(2000, 1.0, 20.0)  # a kernel is compiled when it is first used
    assert drift.factor(2000) == 1
    for _ in range(2):
        drift.observe(2000, 1.0, 0.8)
    assert drift.factor(2000) in (0.8, 1)
    drift.observe(2000, 1.0, 0.8)
    assert drift.factor(2000) == 0.8
    drift.observe(2000, 1.0, 20.0)
    assert drift.factor(2000) == 0.8
    # Of two in the middle, the nearer to none.
    slow = Drift()
    for ratio in (2.0, 2.0, 4.0):
        slow.observe(50, 1.0, ratio)
    assert slow.factor(50) == 2
    for _ in range(200):
        slow.forget(50)
    assert slow.factor(50) == pytest.approx(1, abs=0.03)


def test_forgetting_where_nothing_is_known_does_nothing():
    Drift().forget(5)
