"""Samples as means with paired intervals: over all questions, by set and by kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvblend_rag.quality import aggregate, bootstrap, two_chunk
from kvblend_rag.quality.arms import Arm
from kvblend_rag.quality.bootstrap import Interval, Values
from kvblend_rag.quality.questions import Question
from kvblend_rag.quality.score import Sample

ALL = "all"
REAL = "real questions"
"""All but those made here; a group only where some were made here."""

MADE_SETS = (aggregate.SET, two_chunk.SET)
"""Sets of the questions made here."""

TWO_CHUNKS = "answers from two chunks"
"""Of those made here, the ones whose answer no chunk alone holds."""

PUBLISHED = ("first", "deviation")
"""Selectors as published (EPIC, CacheBlend), which ours are compared with at the same budget."""

_MEANS = ("exact", "f1", "same", "kl", "recomputed", "computed", "scored", "blended")
_CHANGES = ("exact", "f1", "nll")


def groups(questions: Sequence[Question]) -> dict[str, list[int]]:
    """Indices of the questions in each group: all, real and made ones, by set, by kind; equal groups once."""
    several: dict[str, list[int]] = {ALL: list(range(len(questions)))}
    made = [place for place, question in enumerate(questions) if question.set in MADE_SETS]
    if 0 < len(made) < len(questions):
        several[REAL] = sorted({*several[ALL]} - {*made})
    two = [place for place in made if questions[place].set == two_chunk.SET]
    if needed := [place for place in two if len(set(questions[place].supporting)) > 1]:
        several[TWO_CHUNKS] = needed
    for name in ("set", "kind"):
        for value in sorted({getattr(question, name) for question in questions}):
            several[f"{name}: {value}"] = [
                place for place, question in enumerate(questions) if getattr(question, name) == value
            ]
    seen: dict[tuple[int, ...], str] = {}
    for group, places in several.items():
        seen.setdefault(tuple(places), group)
    return {group: list(places) for places, group in seen.items()}


def summarise(
    questions: Sequence[Question], arms: Sequence[Arm], samples: Mapping[str, Sequence[Sample]]
) -> dict[str, Any]:
    """By group and arm ``{name: [value, low, high]}``, 95 % intervals, JSON-able.

    ``exact``, ``f1``, ``same``, ``kl``, ``recomputed``, ``computed``, ``scored`` and ``blended`` are means;
    ``exact_change``, ``f1_change`` and ``nll_change`` differences to the full prefill (of ``nll`` in nats a
    token, above 0 is worse); ``f1_share`` is F1 as a share of the full prefill's. ``kl_share`` and
    ``kl_published_share`` are KL as a share of the best published selector's at the same budget: behind the ingest
    context of the measurement, and as published, behind the first special token alone (``@bos``), where such arms
    were asked.

    Args:
        questions: in the order of the samples.
        arms: the ways, a full prefill among them.
        samples: by arm's name.
    """
    (plain,) = (arm.name for arm in arms if arm.plain)
    table = {name: _columns(several) for name, several in samples.items()}
    summary: dict[str, Any] = {}
    for group, places in groups(questions).items():
        of = {name: {key: values[places] for key, values in columns.items()} for name, columns in table.items()}
        rows = {}
        for arm in arms:
            own = of[arm.name]
            row = {key: bootstrap.mean(own[key]) for key in _MEANS}
            row |= {f"{key}_change": bootstrap.mean(own[key] - of[plain][key]) for key in _CHANGES}
            row["f1_share"] = bootstrap.ratio(own["f1"], of[plain]["f1"])
            for name, context in (("kl_share", None), ("kl_published_share", "bos")):
                rival = _rival(arm, context, arms, of)
                if rival is not None:
                    row[name] = bootstrap.ratio(own["kl"], of[rival]["kl"])
            rows[arm.name] = {key: _listed(interval) for key, interval in row.items()}
        summary[group] = {"questions": len(places), "arms": rows}
    return summary


def _columns(samples: Sequence[Sample]) -> dict[str, Values]:
    names = {*_MEANS, *_CHANGES}
    return {name: np.array([getattr(sample, name) for sample in samples], dtype=np.float64) for name in names}


def _rival(arm: Arm, context: str | None, arms: Sequence[Arm], of: Mapping[str, Mapping[str, Values]]) -> str | None:
    """The published selector with the lowest KL at an arm's budget behind a context, in the same group."""
    budget = arm.options.get("ratio")
    if budget is None or arm.options.get("selector") in PUBLISHED:
        return None
    rivals = [
        each.name
        for each in arms
        if each.options.get("selector") in PUBLISHED and each.options.get("ratio") == budget and each.context == context
    ]
    return min(rivals, key=lambda name: float(of[name]["kl"].mean()), default=None)


def _listed(interval: Interval) -> list[float | None]:
    return [None if np.isnan(each) else each for each in interval.to_list()]


__all__ = ["ALL", "MADE_SETS", "PUBLISHED", "REAL", "TWO_CHUNKS", "groups", "summarise"]
