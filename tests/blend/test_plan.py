import dataclasses
import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvblend_rag.blend.match import Match
from kvblend_rag.blend.plan import BlendPlan, make_plan


@st.composite
def plans(draw):
    tokens = draw(st.integers(1, 300))
    edges = sorted(draw(st.sets(st.integers(0, tokens), max_size=12)))
    runs = [
        Match(f"k{start}", start, draw(st.integers(0, 9)), stop - start)
        for start, stop in zip(edges[::2], edges[1::2], strict=False)
    ]
    return runs, make_plan(np.arange(tokens), runs, min_run=draw(st.integers(1, 20)))


@given(plans(), st.integers(0, 400), st.integers(1, 20), st.floats(0, 1))
def test_the_groups_add_up(drawn, first, min_run, ratio):
    runs, whole = drawn
    for plan in (whole, whole.clip(first, min_run), whole.clip(first).clip(first + 7, min_run)):
        groups = [list(range(plan.cached))]
        groups += [list(range(a, b)) for a, b in plan.computed_ranges()]
        groups += [list(range(run.start, run.stop)) for run in plan.runs]
        assert sorted(itertools.chain(*groups)) == list(range(plan.prompt_tokens))
        assert plan.cached + plan.reused_tokens + plan.computed_tokens == plan.prompt_tokens
        assert sum(b - a for a, b in plan.computed_ranges()) == plan.computed_tokens
        # the last token is always computed, as the end of the question
        assert plan.computed_ranges()[-1][1] == plan.prompt_tokens
        start, stop = plan.question_range
        assert plan.computed_ranges()[-1] == (start, stop)
        assert plan.first_reused == (plan.runs[0].start if plan.runs else None)
        positions, number = plan.reused_positions()
        assert positions.shape == number.shape == (plan.reused_tokens,)
        assert positions.tolist() == [p for run in plan.runs for p in range(run.start, run.stop)]
        assert [plan.runs[i].start <= p < plan.runs[i].stop for p, i in zip(positions, number, strict=True)] == [
            True
        ] * len(positions)
        assert 0 <= plan.budget(ratio) <= ratio * plan.reused_tokens + 1e-6
        for part in plan.runs:
            (origin,) = (run for run in runs if run.start <= part.start < run.stop)
            assert part.start - part.chunk_start == origin.start - origin.chunk_start
        assert pickle.loads(pickle.dumps(plan)) == plan


def test_a_run_to_the_end_is_cut_by_one():
    plan = make_plan(np.arange(40), [Match("a", 20, 5, 20)])
    assert plan.runs == (Match("a", 20, 5, 19),)
    assert plan.question_range == (39, 40)
    assert make_plan(np.arange(36), [Match("a", 20, 5, 16)], min_run=16).runs == ()


def test_short_runs_are_computed():
    matches = [Match("a", 0, 0, 15), Match("b", 15, 0, 16)]
    assert [run.key for run in make_plan(np.arange(50), matches, min_run=16).runs] == ["b"]


def test_clip():
    plan = make_plan(np.arange(100), [Match("a", 10, 2, 30), Match("b", 50, 0, 30)])
    assert plan.clip(0) == plan
    clipped = plan.clip(24)
    assert clipped.runs == (Match("a", 24, 16, 16), Match("b", 50, 0, 30))
    assert clipped.computed_ranges() == [(40, 50), (80, 100)]
    assert plan.clip(25, min_run=16).runs == (Match("b", 50, 0, 30),)
    assert plan.clip(1000).computed_ranges() == [(99, 100)]
    with pytest.raises(ValueError, match="-1 tokens"):
        plan.clip(-1)


@pytest.mark.parametrize(("ratio", "tokens"), [(0, 0), (0.29, 29), (0.15, 15), (0.155, 15), (1, 100)])
def test_budget(ratio, tokens):
    plan = make_plan(np.arange(200), [Match("a", 0, 0, 100)])
    assert plan.budget(ratio) == tokens


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_a_budget_out_of_range(ratio):
    with pytest.raises(ValueError, match="between 0 and 1"):
        make_plan(np.arange(20), []).budget(ratio)


@pytest.mark.parametrize(
    "matches",
    [[Match("a", 0, 0, 20), Match("b", 19, 0, 20)], [Match("a", 90, 0, 20)], [Match("a", -1, 0, 20)]],
)
def test_matches_that_do_not_fit(matches):
    with pytest.raises(ValueError, match="does not fit"):
        make_plan(np.arange(100), matches)


def test_an_empty_prompt():
    with pytest.raises(ValueError, match="empty"):
        make_plan(np.zeros(0, np.int32), [])


PROMPT = np.arange(100)
PLAN = make_plan(PROMPT, [Match("a", 10, 2, 30), Match("b", 50, 0, 30)])


def changed(at):
    prompt = PROMPT.copy()
    prompt[at] += 1000
    return make_plan(prompt, PLAN.runs)


@pytest.mark.parametrize(
    "plan",
    [
        *(
            dataclasses.replace(PLAN, runs=(dataclasses.replace(PLAN.runs[0], **{name: value}), PLAN.runs[1]))
            for name, value in {"key": "c", "start": 9, "chunk_start": 3, "length": 29}.items()
        ),
        dataclasses.replace(PLAN, runs=PLAN.runs[:1]),
        changed(5),
        changed(45),
        changed(85),
        make_plan(np.arange(101), PLAN.runs),
    ],
)
def test_the_digest_changes_with_every_part_of_the_plan(plan):
    assert plan.digest("question", 0.15, 16) != PLAN.digest("question", 0.15, 16)


def test_the_digest_changes_with_every_setting():
    digests = [
        PLAN.digest("question", 0.15, 16),
        PLAN.digest("first", 0.15, 16),
        PLAN.digest("question", 0.2, 16),
        PLAN.digest("question", 0.15, 32),
        PLAN.digest("question", 0.15, 16, layers=2),
        PLAN.digest("question", 0.15, 16, layers=3),
        PLAN.digest("question", 0.15, 16, of="key"),
        PLAN.digest("question", 0.15, 16, sees_question=False),
    ]
    assert len(set(digests)) == len(digests)
    assert all(len(digest) == 32 for digest in digests)
    assert PLAN.digest("question", 0.15, 16, a=1, b=2) == PLAN.digest("question", 0.15, 16, b=2, a=1)
    assert make_plan(PROMPT, PLAN.runs) == PLAN


def test_the_digest_of_a_selection_that_sees_no_question():
    def digest(plan):
        return plan.digest("first", 0.15, 16, sees_question=False)

    assert digest(changed(85)) == digest(make_plan(np.arange(120), PLAN.runs)) == digest(PLAN)
    assert digest(changed(45)) != digest(PLAN)


def test_the_digest_holds_across_processes_and_prefix_hits():
    assert PLAN.digest("question", 0.15, 16) == BlendPlan.digest(PLAN.clip(8), "question", 0.15, 16)
    assert PLAN.clip(12).digest("question", 0.15, 16) != PLAN.digest("question", 0.15, 16)
