"""How far a second answer disputes a first: whether they part, and what its tokens lose up to there."""

import math

import pytest

from kvblend_rag.calibration.risk import Signals
from kvblend_rag.config import BlendConfig
from kvblend_rag.output import CompletionOutput
from kvblend_rag.second_opinion import BEGINNING, beginning, disputed, second_options, with_second
from kvblend_rag.testing.script import FakeLogprob


def answer(*steps):
    """Each step: the token, and the probabilities of those listed."""
    listed = [
        {token: FakeLogprob(logprob=math.log(p), rank=1, decoded_token="") for token, p in choices.items()}
        for _, choices in steps
    ]
    return CompletionOutput(index=0, text="", token_ids=tuple(token for token, _ in steps), logprobs=listed)


SURE = answer((1, {1: 0.9, 2: 0.1}), (3, {3: 0.8, 4: 0.1}))


@pytest.mark.parametrize(
    ("second", "parted", "lost"),
    [
        (SURE, False, 0.0),
        (answer((1, {1: 0.95, 2: 0.05}), (3, {3: 0.9, 4: 0.1})), False, 0.0),  # surer still
        (answer((1, {1: 0.9, 2: 0.1}), (3, {3: 0.6, 4: 0.3})), False, 0.25),
        (answer((2, {2: 0.55, 1: 0.45}), (7, {7: 0.9, 8: 0.1})), True, 0.5),  # behind the parting nothing is compared
        (answer((5, {5: 0.6, 6: 0.3}), (3, {3: 0.8, 4: 0.1})), True, 8 / 9),  # not listed: at most what is left
        (answer((5, {5: 0.5, 6: 0.05}), (3, {3: 0.8, 4: 0.1})), True, 1 - 0.05 / 0.9),  # and at most the least listed
        (answer((5, {5: 0.91}), (3, {3: 0.8})), True, 0.9),
        (answer((1, {1: 0.45, 2: 0.4})), True, 0.5),  # shorter
        (answer(), True, 0.0),
    ],
)
def test_an_answer_is_disputed_by_parting_and_by_what_it_loses(second, parted, lost):
    assert disputed(SURE, second) == pytest.approx((parted + lost) / 2, abs=1e-9)


def test_without_log_probabilities_parting_alone_counts():
    bare = CompletionOutput(index=0, text="", token_ids=(1, 3))
    assert disputed(bare, SURE) == 0.0
    assert disputed(bare, answer((1, {1: 0.9}))) == 0.5


def test_of_a_stream_the_first_tokens_are_compared():
    """The last tokens of these differ, and no one before them."""
    same = [(1, {1: 0.9, 2: 0.1})] * BEGINNING
    longer, other = answer(*same, (3, {3: 0.8, 4: 0.1})), answer(*same, (4, {4: 0.6, 3: 0.4}))
    assert beginning(longer).token_ids == (1,) * BEGINNING
    assert len(beginning(longer).logprobs) == BEGINNING
    signals = with_second(Signals(first_margin=1.0), longer, other)
    assert signals == Signals(first_margin=1.0, disputed=pytest.approx(0.75), disputed_early=0.0)
    assert beginning(SURE) == SURE
    assert beginning(CompletionOutput(index=0, text="", token_ids=(1,) * 99)).logprobs is None


def test_the_second_request_differs_in_its_budget_alone():
    config = BlendConfig(max_risk=0.5, second_opinion=0.3)
    given = {"tenant": "acme", "span": 32, "coverage": 0.7}
    asked = second_options(given, config.for_request(given))
    assert asked == {"tenant": "acme", "span": 32, "coverage": 1.0, "ratio": 0.3, "max_risk": 1.0}


@pytest.mark.parametrize(
    "options", [{"ratio": 0.3}, {"ratio": 0.5}, {"selector": "none"}, {"selector": "everything"}, {"exact": True}]
)
def test_no_second_request_where_it_would_recompute_no_more(options):
    config = BlendConfig(max_risk=0.5, second_opinion=0.3)
    assert second_options(options, config.for_request(options)) is None
