import dataclasses
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvblend_rag import selectors
from kvblend_rag.blend.match import Match
from kvblend_rag.blend.plan import make_plan
from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import ConfigError
from kvblend_rag.selectors import get_selector, names
from kvblend_rag.selectors.base import Evidence, SelectionInput, Selector
from kvblend_rag.selectors.deviation import DeviationSelector
from kvblend_rag.selectors.spans import mask_to_ranges

BUILT_IN = ["deviation", "everything", "first", "none", "question"]


def given_for(lengths, budget, span=4, seed=0, gap=3):
    run = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    random = torch.Generator().manual_seed(seed)
    evidence = {
        name: torch.rand(len(run), generator=random)
        for name in ("question_mass", "last_mass", "key_deviation", "value_deviation")
    }
    return SelectionInput(positions=torch.arange(len(run)) + gap * run, run=run, budget=budget, span=span, **evidence)


@pytest.mark.parametrize("name", BUILT_IN)
@given(st.lists(st.integers(1, 50), max_size=5), st.integers(0, 200), st.integers(1, 20), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_the_budget_is_never_exceeded(name, lengths, budget, span, seed):
    given_ = given_for(lengths, budget, span, seed)
    selector = get_selector(name)
    mask = selector.select(given_)
    assert (mask.dtype, mask.shape) == (torch.bool, given_.positions.shape)
    wanted = {"none": 0, "everything": len(mask)}.get(name, min(budget, len(mask)))
    assert int(mask.sum()) == wanted
    assert torch.equal(mask, selector.select(given_))


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_selector_needs_what_it_says_and_no_more(name):
    full = given_for([20, 30], 10)
    selector = get_selector(name)
    fields = {
        Evidence.LOADED: set(),
        Evidence.QUESTION_ATTENTION: {"question_mass", "last_mass"},
        Evidence.DEVIATION: {"key_deviation", "value_deviation"},
    }
    needed = set().union(*(fields[need] for need in selector.needs))
    missing = {name: None for names_ in fields.values() for name in names_ if name not in needed}
    assert torch.equal(selector.select(dataclasses.replace(full, **missing)), selector.select(full))
    if needed:
        nothing = dict.fromkeys(needed)
        with pytest.raises(ValueError, match="was not gathered"):
            selector.select(dataclasses.replace(full, **nothing))


@pytest.mark.parametrize("name", ["deviation", "question"])
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=5), st.floats(0, 0.999), st.integers(1, 20), st.integers(0, 99)
)
@settings(max_examples=40, deadline=None)
def test_an_adaptive_budget_covers_what_it_should_and_no_span_more(name, lengths, coverage, span, seed):
    whole = given_for(lengths, sum(lengths), span, seed)
    adaptive = dataclasses.replace(whole, coverage=coverage)
    selector = get_selector(name)
    mask = selector.select(adaptive)
    left = selector.uncovered(adaptive, mask)
    assert left <= 1 - coverage + 1e-5
    # the same tokens come first as with a fixed budget, and one span fewer would not do
    count = int(mask.sum())
    assert torch.equal(mask, selector.select(dataclasses.replace(whole, budget=count)))
    fewer = selector.select(dataclasses.replace(whole, budget=max(count - span, 0)))
    assert count == 0 or selector.uncovered(whole, fewer) >= 1 - coverage - 1e-5


def _asked(hot, spread):
    """200 tokens, each with a little mass, and ``hot`` spans of 4 that hold most of it where it is not spread."""
    mass = torch.full((200,), 1.0)
    if not spread:
        for place in hot:
            mass[place : place + 4] = 200.0
    return dataclasses.replace(given_for([100, 100], 200), question_mass=mass, last_mass=mass, coverage=0.7)


def test_spread_mass_gets_more_budget_and_in_the_end_everything():
    selector = get_selector("question")
    one, three = (int(selector.select(_asked(hot, False)).sum()) for hot in ([40], [40, 80, 160]))
    spread = _asked([], True)
    assert one < three < int(selector.select(spread).sum()) < 200
    limited = dataclasses.replace(spread, full_share=0.5)
    assert selector.select(limited).all()
    assert int(selector.select(dataclasses.replace(_asked([40], False), full_share=0.5)).sum()) == one


def test_the_budget_still_bounds_an_adaptive_one():
    given_ = dataclasses.replace(_asked([], True), budget=30)
    mask = get_selector("question").select(given_)
    assert int(mask.sum()) == 30
    assert get_selector("question").uncovered(given_, mask) == pytest.approx(170 / 200)


def test_selectors_without_a_score_say_so():
    given_ = given_for([20], 5)
    for name in ("none", "first", "everything"):
        selector = get_selector(name)
        assert selector.uncovered(given_, selector.select(given_)) is None


def test_first_tokens_of_each_run():
    given_ = given_for([10, 2, 10], 9)
    ranges = mask_to_ranges(given_.positions, get_selector("first").select(given_))
    # a span of 4 of each run, as far as the run and the budget go
    assert ranges == [(0, 4), (13, 15), (18, 21)]


def test_deviation_goes_by_value_or_by_key():
    given_ = given_for([16, 16], 4)
    value, key = torch.zeros(32), torch.zeros(32)
    value[8], key[20] = 1, 1
    given_ = dataclasses.replace(given_, value_deviation=value, key_deviation=key)
    assert mask_to_ranges(given_.positions, get_selector("deviation").select(given_)) == [(8, 12)]
    assert mask_to_ranges(given_.positions, DeviationSelector(of="key").select(given_)) == [(23, 27)]


def test_the_question_selector_wants_both_to_look():
    question, last = torch.full((32,), 0.01), torch.full((32,), 0.001)
    question[:4] += 100.0
    last[8:12] += 100.0
    question[20:24] += 5.0
    last[20:24] += 5.0
    given_ = dataclasses.replace(given_for([32], 4), question_mass=question, last_mass=last)
    assert mask_to_ranges(given_.positions, get_selector("question").select(given_)) == [(20, 24)]


def test_the_question_selector_takes_tiny_and_broken_masses():
    tiny = torch.full((64,), 1e-30)
    tiny[40] = 1e-20
    given_ = dataclasses.replace(given_for([64], 4), question_mass=tiny, last_mass=tiny)
    assert get_selector("question").select(given_)[40:44].all()
    broken = torch.full((64,), float("nan"))
    given_ = dataclasses.replace(given_, question_mass=broken, last_mass=torch.zeros(64))
    mask = get_selector("question").select(given_)
    assert int(mask.sum()) == 4
    assert get_selector("question").uncovered(given_, mask) == 1.0


def test_the_input_of_a_plan():
    plan = make_plan(np.arange(100), [Match("a", 10, 0, 30), Match("b", 50, 0, 30)])
    given_ = SelectionInput.from_plan(plan, 0.5, 16, question_mass=torch.ones(60))
    assert given_.positions.tolist() == [*range(10, 40), *range(50, 80)]
    assert given_.run.tolist() == [0] * 30 + [1] * 30
    assert (given_.budget, given_.span) == (30, 16)
    assert given_.positions.dtype == given_.run.dtype == torch.int64


@pytest.mark.parametrize("wrong", [{"budget": -1}, {"span": 0}, {"last_mass": torch.ones(3)}])
def test_a_wrong_input(wrong):
    with pytest.raises(ValueError, match=r"at least|has shape"):
        dataclasses.replace(given_for([20], 5), **wrong)


def test_names():
    assert set(BUILT_IN) <= set(names())
    assert BlendConfig().selector in names()
    assert [get_selector(name).name for name in BUILT_IN] == BUILT_IN


def test_an_unknown_name():
    with pytest.raises(ConfigError, match=r"Unknown selector 'qestion'. Did you mean 'question'\?"):
        get_selector("qestion")
    with pytest.raises(ConfigError, match="Known ones: deviation, everything, first, none, question"):
        get_selector("zzzzzz")


class Odd(Selector):
    """Someone else's."""

    name = "odd"

    def select(self, given):
        return given.positions % 2 == 1


def test_someone_elses_selector(monkeypatch):
    points = EntryPoints(
        EntryPoint(name, value, selectors.GROUP)
        for name, value in {"odd": "theirs:Odd", "wrong": "theirs:thing", "none": "theirs:Odd"}.items()
    )
    monkeypatch.setattr(selectors, "entry_points", lambda **wanted: points.select(**wanted))
    monkeypatch.setattr(EntryPoint, "load", lambda entry: Odd if entry.name == "odd" else 3)
    assert get_selector("odd").select(given_for([4], 4, gap=0)).tolist() == [False, True, False, True]
    assert {"odd", "wrong"} <= set(names())
    assert get_selector("none").name == "none"
    with pytest.raises(ConfigError, match=r"'wrong' of group kvblend.selectors is 3"):
        get_selector("wrong")


def test_the_registry_imports_nothing_before_it_is_asked():
    code = "import sys, kvblend_rag.selectors as s; s.names(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
