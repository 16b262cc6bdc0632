"""How `kvblend verify` compares two answers; it runs on engines in `test_with_engine` and by `tools/`."""

import math

import pytest

from kvblend_rag.commands.verify import _Answer

TOLERANCE = 0.01


def answer(*steps):
    """Each step: the token that was chosen, and the candidates' log-probabilities."""
    return _Answer(tuple(token for token, _ in steps), tuple(each for _, each in steps), None)


SAME = (1, {1: -0.5, 2: -1.5})


@pytest.mark.parametrize(
    ("mine", "theirs", "difference"),
    [
        ((1, {1: -0.5, 2: -1.5}), (1, {1: -0.53, 2: -1.5}), 0.03),
        # As good as equal: which of the two comes is rounding, and what follows is another text.
        ((1, {1: -0.700, 2: -0.701}), (2, {1: -0.701, 2: -0.700}), 0.0),
        ((1, {1: -0.5, 2: -1.5}), (2, {1: -1.5, 2: -0.5}), math.inf),
        ((1, {1: -0.5, 2: -1.5}), (3, {3: -0.5, 1: -1.5}), math.inf),
    ],
)
def test_answers_are_compared_up_to_a_tie(mine, theirs, difference):
    assert answer(SAME, mine).difference(answer(SAME, theirs), near=TOLERANCE) == pytest.approx(difference)


def test_behind_a_tie_texts_are_not_compared():
    tie = (1, {1: -0.700, 2: -0.701}), (2, {1: -0.701, 2: -0.700})
    mine, theirs = (answer(SAME, first, (token, {token: -1.0})) for first, token in zip(tie, (5, 6), strict=True))
    assert mine.difference(theirs, near=TOLERANCE) == 0.0


@pytest.mark.parametrize(
    ("theirs", "difference"),
    [
        # The penalised candidate 1 is likelier, and the two were a tie after the penalty.
        ((2, {1: -0.5, 2: -1.5}), 0.0),
        ((2, {1: -0.52, 2: -1.5}), 0.02),
        ((2, {1: -1.5, 2: -0.5}), 1.0),
        ((2, {2: -0.5}), 1.0),
        ((3, {3: -0.5}), math.inf),
    ],
)
def test_where_a_penalty_chose_the_candidates_must_agree(theirs, difference):
    mine = answer(SAME, (1, {1: -0.5, 2: -1.5}))
    assert mine.difference(answer(SAME, theirs), near=TOLERANCE, penalised=True) == pytest.approx(difference)
