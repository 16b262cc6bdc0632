"""Judge: from a measurement to a verdict.

Three questions, in this order. Is the stored KV the model's own, at the place where it is loaded? Does
everything recomputed give a full prefill's answer? Which is the smallest budget that keeps enough of it?
The first two hold to the noise of the model alone, so a sound model passes them whatever its quality; the
third is the user's choice (``Limits``).
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kvblend_rag.calibration.risk import DEFAULT_RISK, RiskModel
from kvblend_rag.calibration.verdict import Verdict
from kvblend_rag.quality import bootstrap
from kvblend_rag.quality.measurement import Cell, Deviation, Measurement

_NOISE_FACTOR = 4.0
"""Stored KV and the scattered forward may differ by this many times what the model differs from itself."""
_MOVED_FACTOR = 2.0
"""And by this many times what its values differ by between the two positions: keys differ a little more."""
_LEAST_KL = {"float32": 1e-4}
_COARSE_KL = 0.02
"""KL floor in bfloat16 and float16: measured 0.0005 to 0.003 for two prefills of different batches."""
_MISTAKEN = 0.01
"""How often a variation may be taken for better that is not, all that were tried together."""
_AS_GOOD = 0.05
"""Share of the default's KL by which a cheaper variation may be worse, at the far end of the interval."""
_EARLY = 0.99
"""Level of the intervals by which no more questions are asked: who looks several times is wrong more often."""
_AS_DEAR = 0.01
"""Share of the chunk tokens that a variation may recompute beyond what the default does."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is accepted."""

    deviation: float = 0.05
    """Relative error of stored KV: 8-bit quantisation gives 0.005 (fp8: 0.03), four bits near 0.1."""
    loss: float = 0.05
    """Nats a token of the gold answer that the whole interval must stay below; above 0 is worse than a prefill."""
    kept: float = 0.95
    """Share of what the documents tell the model that must be kept: 1 − KL / KL without documents."""
    near: float = 0.05
    """KL in nats up to which a smaller share, ``least``, will do: documents may tell little."""
    least: float = 0.8
    """Share that must be kept in any case."""
    level: float = bootstrap.LEVEL
    """Of the interval."""
    share: float = 0.5
    """Largest mean share of chunk tokens recomputed; beyond, a full prefill is not much dearer."""

    def deviation_bound(self, found: Deviation) -> float:
        """What stored KV may be off by, where the model's own computations differ as was found."""
        return max(self.deviation, _NOISE_FACTOR * found.noise, _MOVED_FACTOR * found.moved)


def judge(measured: Measurement, limits: Limits | None = None, risk: RiskModel = DEFAULT_RISK) -> Verdict:
    """Whether a model may be blended, and the cheapest way that keeps enough.

    Args:
        measured: of this model behind this ingest context.
        limits: what is accepted.
        risk: goes into the verdict.
    """
    limits = limits or Limits()
    fault = _fault(measured, limits)
    if fault is not None:
        return _verdict(measured, risk, "refused", fault)
    budget = promising(measured, limits)
    cell = None if budget is None else variation(measured, budget, limits)
    instead = None if budget is None or cell is None else _instead(cell, budget)
    if cell is None:
        cell = cheapest(measured, limits)
    if cell is None:
        hopeful = [each for each in measured.cells if each.share <= limits.share and _may_pass(each, measured, limits)]
        if hopeful:
            return _verdict(measured, risk, "undecided", _too_few(measured, hopeful, limits))
        return _verdict(measured, risk, "refused", _too_little(measured, limits))
    loss, low, high = _interval(cell.loss)
    reason = (
        f"with {cell.share:.0%} of the chunk tokens recomputed the gold answer loses {loss:.3f} nats a token "
        f"({low:.3f} to {high:.3f}), {np.mean(cell.same):.0%} of the answers are the full prefill's, and "
        f"{kept(cell, measured):.0%} of what the documents tell is kept" + (f"; {instead}" if instead else "")
    )
    return _verdict(measured, risk, "accepted", reason, cell)


def decided(measured: Measurement, limits: Limits) -> bool:
    """Whether more questions would hardly change the verdict: by wider intervals, too, there is one."""
    return judge(measured, replace(limits, level=_EARLY)).status != "undecided"


def kept(cell: Cell, measured: Measurement) -> float:
    """Share of the documents' effect on the next-token distributions that is kept, at most 1."""
    return 1.0 - float(np.mean(cell.kl)) / max(float(np.mean(measured.blind_kl)), 1e-9)


def cheapest(measured: Measurement, limits: Limits) -> Cell | None:
    """The cell of the smallest share that passes and from which on every larger one of its selector does.

    The second keeps a lucky figure at a small budget from being chosen.
    """
    passing = []
    for cell in measured.cells:
        larger = [each for each in measured.cells if _kind(each) == _kind(cell) and each.share >= cell.share]
        if cell.share <= limits.share and all(_passes(each, measured, limits) for each in [cell, *larger]):
            passing.append(cell)
    return min(passing, key=lambda cell: cell.share, default=None)


def promising(measured: Measurement, limits: Limits) -> Cell | None:
    """The budget at which it pays to try other spans and layers: the cheapest that passes, or what comes nearest.

    None where there is a fault, or no budget small enough to be accepted.
    """
    if _fault(measured, limits) is not None:
        return None
    fitting = [cell for cell in measured.cells if 0 < cell.share <= limits.share]  # reuse alone chooses nothing
    return cheapest(measured, limits) or min(fitting, key=lambda cell: _mean(cell.kl), default=None)


def variation(measured: Measurement, budget: Cell, limits: Limits) -> Cell | None:
    """The best of a budget's variations that passes and is better than it, or as good and cheaper; None: it stays.

    Better is a paired interval of KL below zero, wide enough for the best of so many tried ways.
    Cheaper counts only where the budget itself is accepted.
    """
    accepted, found = cheapest(measured, limits) is not None, []
    for cell in measured.variations:
        if not _passes(cell, measured, limits) or cell.share > budget.share + _AS_DEAR:
            continue
        change = _change(cell, budget, 1 - _MISTAKEN / len(measured.variations))
        if change.high < (_AS_GOOD * _mean(budget.kl) if accepted and _is_cheaper(cell, budget) else 0.0):
            found.append(cell)
    return min(found, key=lambda cell: _mean(cell.kl), default=None)


def _change(cell: Cell, budget: Cell, level: float = bootstrap.LEVEL) -> bootstrap.Interval:
    """By how much a variation's KL differs from its budget's, question by question."""
    return bootstrap.mean(np.subtract(cell.kl, budget.kl), level=level)


def _is_cheaper(cell: Cell, budget: Cell) -> bool:
    """Longer spans are fewer rows, and a scoring pass that looks at the middle layers ends behind them."""
    longer = bool(cell.settings["span_size"] > budget.settings["span_size"])
    return longer or cell.settings["score_layers"] == "middle" != budget.settings["score_layers"]


def _instead(cell: Cell, budget: Cell) -> str:
    other = [f"{name}: {value}" for name, value in cell.settings.items() if budget.settings[name] != value]
    value, low, high = _change(cell, budget).to_list()
    return f"{', '.join(other)} changes KL by {value:+.3f} nats ({low:+.3f} to {high:+.3f})"


def _kind(cell: Cell) -> tuple[Any, ...]:
    return cell.settings["selector"], cell.settings.get("coverage", 1.0) < 1, cell.settings.get("span_size")


def _passes(cell: Cell, measured: Measurement, limits: Limits) -> bool:
    """The whole interval, since the best of several noisy means is good by chance: with few questions, always one."""
    return _interval(cell.loss, limits.level)[2] <= limits.loss and _keeps_enough(cell, measured, limits)


def _may_pass(cell: Cell, measured: Measurement, limits: Limits) -> bool:
    """Not shown to lose too much."""
    return _interval(cell.loss, limits.level)[1] <= limits.loss and _keeps_enough(cell, measured, limits)


def _keeps_enough(cell: Cell, measured: Measurement, limits: Limits) -> bool:
    return kept(cell, measured) >= (limits.least if _mean(cell.kl) <= limits.near else limits.kept)


def _fault(measured: Measurement, limits: Limits) -> str | None:
    deviation = measured.deviation
    bound = limits.deviation_bound(deviation)
    if not deviation.error <= bound:
        return (
            f"stored KV is not what the model computes: a relative error of {deviation.error:.2g} in "
            f"{deviation.where}, where {bound:.2g} is allowed"
        )
    if not measured.questions:
        return "no question fits into the model's context"
    floor = _LEAST_KL.get(measured.identity.dtype, _COARSE_KL)
    bound = max(floor, _NOISE_FACTOR * _mean(measured.noise_kl))
    if not _mean(measured.exact_kl) <= bound:
        return (
            f"with everything recomputed the next-token distributions differ from a full prefill's by "
            f"{_mean(measured.exact_kl):.2g} nats, where {bound:.2g} is allowed"
        )
    return None


def _too_few(measured: Measurement, hopeful: Sequence[Cell], limits: Limits) -> str:
    best = min(hopeful, key=lambda cell: _interval(cell.loss)[2])
    loss, low, high = _interval(best.loss)
    return (
        f"{measured.questions} questions are too few to tell: at best, with {best.share:.0%} recomputed, the gold "
        f"answer loses {loss:.3f} nats a token, by the 95 % interval {low:.3f} to {high:.3f}, and all of that must be "
        f"at most {limits.loss:g}; ask more of them"
    )


def _too_little(measured: Measurement, limits: Limits) -> str:
    fitting = [cell for cell in measured.cells if cell.share <= limits.share]
    if not fitting:
        return f"no way of blending with at most {limits.share:.0%} recomputed was measured"
    best = min(fitting, key=lambda cell: (_mean(cell.loss) > limits.loss, _mean(cell.kl)))
    return (
        f"blending keeps too little of its answers: at best, with {best.share:.0%} recomputed, the gold answer loses "
        f"{_mean(best.loss):.3f} nats a token ({limits.loss:g} allowed) and {max(kept(best, measured), 0):.0%} of what "
        f"the documents tell is kept ({limits.kept:.0%} needed)"
    )


def _interval(values: Sequence[float], level: float = bootstrap.LEVEL) -> list[float]:
    return bootstrap.mean(np.asarray(values, dtype=np.float64), level=level).to_list()


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _verdict(measured: Measurement, risk: RiskModel, status: Any, reason: str, cell: Cell | None = None) -> Verdict:
    identity = measured.identity
    summary: dict[str, Any] = {
        "questions": measured.questions,
        "deviation": measured.deviation.error,
        **(
            {}
            if not measured.questions
            else {"exact_kl": _mean(measured.exact_kl), "blind_kl": _mean(measured.blind_kl)}
        ),
        "facts": dict(measured.facts),
    }
    if cell is not None:
        summary |= {
            "recomputed_share": cell.share,
            "loss": _interval(cell.loss),
            "kl": _interval(cell.kl),
            "same": _interval(cell.same),
            "kept": kept(cell, measured),
        }
    return Verdict(
        status=status,
        reason=reason,
        model=identity.model,
        fingerprint=identity.fingerprint,
        context=identity.context,
        context_digest=identity.context_digest,
        settings={} if cell is None else dict(cell.settings),
        risk=risk,
        measured=summary,
        made=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


__all__ = ["Limits", "cheapest", "decided", "judge", "kept", "promising", "variation"]
