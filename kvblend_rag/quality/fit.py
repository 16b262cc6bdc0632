"""Fit: the risk of a blended answer, learned from questions that were answered both ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from kvblend_rag.calibration.risk import DEFAULT_RISK, EARLY, WHOLE, Logistic, RiskModel, Signals

_LEAST_OF_A_KIND = 8
"""Answers that differ, and that do not: with fewer, a fit would follow chance."""
_RIDGE = 1.0
_STEPS = 50

Values = npt.NDArray[np.float64]


def fit_risk(signals: Sequence[Signals], differs: Sequence[bool]) -> RiskModel:
    """Logistic regression with a ridge; the default where there is too little to learn from.

    Args:
        signals: one a blended answer.
        differs: whether it was another than the full prefill's.
    """
    labels = np.asarray(differs, dtype=np.float64)
    if min(labels.sum(), len(labels) - labels.sum()) < _LEAST_OF_A_KIND:
        return DEFAULT_RISK
    known = [each.features() for each in signals]
    return RiskModel(_logistic(known, labels, EARLY), _logistic(known, labels, WHOLE))


def _logistic(known: Sequence[Mapping[str, float]], labels: Values, names: Sequence[str]) -> Logistic:
    """Of these features; Newton's method, the intercept not shrunk."""
    count = len(names)
    typical = {name: float(np.mean([each[name] for each in known if name in each] or [0.5])) for name in names}
    columns = np.array([[each.get(name, typical[name]) - typical[name] for name in names] for each in known])
    design = np.column_stack([np.ones(len(labels)), columns])
    ridge = np.diag([0.0, *[_RIDGE] * count])
    weights = np.zeros(count + 1)
    for _ in range(_STEPS):
        chance = 1 / (1 + np.exp(-(design @ weights)))
        slope = design.T @ (labels - chance) - ridge @ weights
        curvature = (design * (chance * (1 - chance))[:, None]).T @ design + ridge
        step = np.linalg.solve(curvature + 1e-9 * np.eye(count + 1), slope)
        weights += step
        if np.abs(step).max() < 1e-9:
            break
    return Logistic(float(weights[0]), dict(zip(names, map(float, weights[1:]), strict=True)), typical)


def auc(risks: Sequence[float], differs: Sequence[bool]) -> float:
    """Probability that an answer that differs has a higher risk than one that does not; ties count half."""
    given, labels = np.asarray(risks, dtype=np.float64), np.asarray(differs, dtype=bool)
    above = given[labels][:, None] - given[~labels][None, :]
    return float(np.mean((above > 0) + 0.5 * (above == 0))) if above.size else float("nan")


def caught(risks: Sequence[float], differs: Sequence[bool], false_alarms: float = 0.1) -> float:
    """Share of the differing answers above the threshold that so many of the others exceed."""
    given, labels = np.asarray(risks, dtype=np.float64), np.asarray(differs, dtype=bool)
    if not labels.any() or labels.all():
        return float("nan")
    threshold = np.quantile(given[~labels], 1 - false_alarms, method="higher")
    return float(np.mean(given[labels] > threshold))


__all__ = ["auc", "caught", "fit_risk"]
