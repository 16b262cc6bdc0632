import itertools
import math

import pytest

from kvblend_rag.calibration.risk import DEFAULT_RISK, EARLY, WHOLE, Logistic, RiskModel, Signals


def test_features_grow_with_risk():
    names = {*EARLY, *WHOLE}
    sure, unsure = (
        Signals(
            uncovered_mass=each,
            moved_mass=each,
            first_margin=20.0 * (1 - each),
            lowest_logprob=-20.0 * each,
            disputed=each,
            disputed_early=each,
        ).features()
        for each in (0.0, 1.0)
    )
    assert set(sure) == set(unsure) == names
    assert all(sure[name] < 1e-6 and unsure[name] > 1 - 1e-6 for name in names)
    assert Signals(first_margin=math.log(2)).features() == pytest.approx({"doubt": 0.5})


def test_what_is_not_known_says_nothing():
    logistic = Logistic(0.0, {"uncovered": 3.0, "doubt": 2.0}, {"uncovered": 0.7, "doubt": 0.1})
    assert logistic({}) == 0.5
    assert logistic({"uncovered": 0.7}) == 0.5
    assert logistic({"uncovered": 1.0, "weakest": 1.0}) == pytest.approx(1 / (1 + math.exp(-0.9)))


def test_the_default_says_so_and_is_monotonous():
    assert not DEFAULT_RISK.calibrated
    for low, high in itertools.pairwise([0.0, 0.5, 1.0]):
        assert DEFAULT_RISK.risk(Signals(uncovered_mass=low)) < DEFAULT_RISK.risk(Signals(uncovered_mass=high))
        below, above = (Signals(first_margin=1.0, lowest_logprob=-each) for each in (low, high))
        assert DEFAULT_RISK.risk(below) < DEFAULT_RISK.risk(above)
        below, above = (Signals(disputed_early=each) for each in (low, high))
        assert DEFAULT_RISK.risk(below) < DEFAULT_RISK.risk(above)


def test_extreme_weights_do_not_overflow():
    assert Logistic(0.0, {"doubt": 1e6}, {"doubt": 0.0})({"doubt": 1.0}) == pytest.approx(1.0)


def test_round_trip():
    assert RiskModel.from_dict(DEFAULT_RISK.to_dict()) == DEFAULT_RISK
