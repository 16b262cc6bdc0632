"""ROC of the risk signal on questions that it was not fitted to, from a result of ``kvblend eval``.

The risk is fitted to the questions of all sets but one and tried on that one, for every set in turn; an answer
counts as different when it is not the full prefill's, normalised. What recomputing moved, and how far a second
opinion disputes the answer, stand alone too where they are known, beside a fit without them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from kvblend_rag.calibration.risk import DEFAULT_RISK, EARLY, WHOLE, Signals
from kvblend_rag.quality.fit import auc, caught, fit_risk

FALSE_ALARMS = (0.05, 0.1, 0.2, 0.3)

OPTIONAL = {"moved": "moved_mass", "disputed": "disputed", "disputed_early": "disputed_early"}
"""Signals that not every evaluation has, by feature."""


def signals(row: dict[str, float]) -> Signals:
    """Back from a sample's features."""
    doubt, weakest = max(row["doubt"], 1e-9), min(row["weakest"], 1 - 1e-9)
    return Signals(
        uncovered_mass=row.get("uncovered"),
        moved_mass=row.get("moved"),
        disputed=row.get("disputed"),
        disputed_early=row.get("disputed_early"),
        first_margin=-math.log(doubt),
        lowest_logprob=math.log1p(-weakest),
    )


def before_the_first_token(given: Signals) -> Signals:
    """What of it is known then."""
    return dataclasses.replace(given, lowest_logprob=None, disputed=None)


def without(given: Signals, feature: str) -> Signals:
    """What is known when one of the optional signals is not."""
    return dataclasses.replace(given, **{OPTIONAL[feature]: None})


def figures(risks: list[float], differs: list[bool]) -> dict[str, Any]:
    """Area under the curve, and how much is caught at some rates of false alarms."""
    return {
        "questions": len(risks),
        "differ": int(np.sum(differs)),
        "auc": round(auc(risks, differs), 3),
        "caught": {f"{rate:.0%} false alarms": round(caught(risks, differs, rate), 3) for rate in FALSE_ALARMS},
    }


def held_out(samples: list[dict[str, Any]], arm: str) -> dict[str, Any]:
    """By set and over all: the fitted risk on what it has not seen, and the default beside it."""
    rows = [each for each in samples if each["arms"][arm].get("blended") and "doubt" in each["arms"][arm]]
    known = [signals(each["arms"][arm]) for each in rows]
    differs = [not each["arms"][arm]["same"] for each in rows]
    sets = [each["set"] for each in rows]
    optional = [name for name, field in OPTIONAL.items() if all(getattr(each, field) is not None for each in known)]
    risks: dict[str, list[float]] = {}

    def note(name: str, place: int, risk: float) -> None:
        risks.setdefault(name, [math.nan] * len(rows))[place] = risk

    for name in sorted(set(sets)):
        learn = [place for place, own in enumerate(sets) if own != name]
        labels = [differs[place] for place in learn]
        model = fit_risk([known[place] for place in learn], labels)
        fewer = {each: fit_risk([without(known[place], each) for place in learn], labels) for each in optional}
        for place in (place for place, own in enumerate(sets) if own == name):
            note("answer", place, model.risk(known[place]))
            note("first", place, model.risk(before_the_first_token(known[place])))
            note("default", place, DEFAULT_RISK.risk(known[place]))
            note("default_first", place, DEFAULT_RISK.risk(before_the_first_token(known[place])))
            for each in optional:
                less = without(known[place], each)
                if each in WHOLE:
                    note(f"answer_un{each}", place, fewer[each].risk(less))
                if each in EARLY:
                    note(f"first_un{each}", place, fewer[each].risk(before_the_first_token(less)))
                note(each, place, known[place].features()[each])
    result: dict[str, Any] = {}
    for group in ("all", *sorted(set(sets))):
        places = [place for place, own in enumerate(sets) if group in ("all", own)]
        result[group] = {
            name: figures([several[place] for place in places], [differs[place] for place in places])
            for name, several in risks.items()
        }
    return result


def main() -> None:
    """Read an evaluation, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("evaluation", type=Path, help="JSON of `kvblend eval`")
    parser.add_argument("--arm", default="question:0.15")
    parser.add_argument("--json", type=Path, required=True, help="where to write the result")
    given = parser.parse_args()
    evaluation = json.loads(given.evaluation.read_text(encoding="utf-8"))
    result = {
        "command": f"python tools/risk_roc.py {given.evaluation} --arm {given.arm} --json {given.json}",
        "evaluation": evaluation["command"],
        "machine": evaluation["machine"],
        "engine": evaluation["engine"],
        "arm": given.arm,
        "held_out": held_out(evaluation["samples"], given.arm),
    }
    given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
