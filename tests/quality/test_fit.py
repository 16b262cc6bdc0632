import dataclasses

import numpy as np
import pytest

from kvblend_rag.calibration.risk import DEFAULT_RISK, Signals
from kvblend_rag.quality.fit import auc, caught, fit_risk


def drawn(count, seed):
    """Answers that differ the more often the weaker their weakest token is; the rest is noise."""
    draw = np.random.default_rng(seed)
    weakest = draw.uniform(0, 1, count)
    signals = [
        Signals(
            uncovered_mass=float(draw.uniform()),
            moved_mass=float(draw.uniform()),
            first_margin=float(draw.exponential(2)),
            lowest_logprob=float(np.log1p(-0.999 * each)),
        )
        for each in weakest
    ]
    return signals, list(draw.uniform(0, 1, count) < 1 / (1 + np.exp(-(6 * weakest - 3))))


def test_the_fit_finds_what_tells_and_is_calibrated_on_other_data():
    model = fit_risk(*drawn(2000, 0))
    assert model.calibrated
    weights = model.answer.weights
    assert weights["weakest"] > 4
    assert abs(weights["uncovered"]) + abs(weights["doubt"]) + abs(weights["moved"]) < 1.2
    signals, differs = drawn(2000, 1)
    risks = np.array([model.risk(each) for each in signals])
    assert auc(risks, differs) > 0.75
    for low in (0.0, 0.25, 0.5, 0.75):
        here = (risks >= low) & (risks < low + 0.25)
        assert np.mean(np.array(differs)[here]) == pytest.approx(risks[here].mean(), abs=0.06)


def test_before_the_first_token_the_rest_is_left_out():
    model = fit_risk(*drawn(200, 0))
    assert set(model.first.weights) == {"uncovered", "doubt", "moved", "disputed_early"}
    assert 0 < model.risk(Signals(uncovered_mass=0.5, first_margin=1.0)) < 1


def test_what_recomputing_moved_is_learned_from_where_it_is_known():
    signals, differs = drawn(400, 0)
    telling = [
        dataclasses.replace(each, moved_mass=float(0.2 + 0.6 * own)) for each, own in zip(signals, differs, strict=True)
    ]
    assert fit_risk(telling, differs).first.weights["moved"] > 3
    unknown = fit_risk([dataclasses.replace(each, moved_mass=None) for each in signals], differs)
    assert unknown.first.weights["moved"] == unknown.answer.weights["moved"] == 0


def test_a_dispute_of_the_first_tokens_tells_of_streams_and_of_all_of_them_of_answers():
    signals, differs = drawn(400, 0)
    told = [0.2 + 0.6 * own for own in differs]
    early = fit_risk(
        [dataclasses.replace(each, disputed_early=own) for each, own in zip(signals, told, strict=True)], differs
    )
    assert early.first.weights["disputed_early"] > 3
    assert "disputed_early" not in early.answer.weights
    late = fit_risk([dataclasses.replace(each, disputed=own) for each, own in zip(signals, told, strict=True)], differs)
    assert late.answer.weights["disputed"] > 3
    assert late.first.weights["disputed_early"] == 0


@pytest.mark.parametrize("differ", [0, 3, 97, 100])
def test_too_little_to_learn_from_gives_the_default(differ):
    signals, _ = drawn(100, 0)
    assert fit_risk(signals, [True] * differ + [False] * (100 - differ)) is DEFAULT_RISK


def test_the_measures_of_a_risk():
    assert auc([0.9, 0.8, 0.1, 0.2], [True, True, False, False]) == 1.0
    assert auc([0.5, 0.5], [True, False]) == 0.5
    assert np.isnan(auc([0.5], [True]))
    assert caught([*np.linspace(0, 1, 11), 0.95, 0.2], [False] * 11 + [True] * 2) == 0.5
    assert np.isnan(caught([0.5], [True]))
