"""A summary as Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvblend_rag.quality.summary import ALL

COLUMNS = (
    ("recomputed", "recomputed", "{:.0%}"),
    ("computed", "computed", "{:.0%}"),
    ("exact", "exact match", "{:.0%}"),
    ("f1", "F1", "{:.1%}"),
    ("f1_share", "F1 / plain's", "{:.0%}"),
    ("same", "same answer", "{:.0%}"),
    ("nll_change", "ΔNLL", "{:+.3f}"),
    ("kl", "KL", "{:.3f}"),
    ("kl_share", "KL / best published, same context", "{:.2f}"),
    ("kl_published_share", "KL / best as published", "{:.2f}"),
)
"""Value, heading and format of each column."""

_WITHOUT_INTERVAL = ("recomputed", "computed")


def summary_table(summary: Mapping[str, Any], group: str = ALL) -> str:
    """One group's arms; in brackets the 95 % interval."""
    lines = ["| | " + " | ".join(heading for _, heading, _ in COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for arm, row in summary[group]["arms"].items():
        cells = [cell(row.get(name), form, interval=name not in _WITHOUT_INTERVAL) for name, _, form in COLUMNS]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cell(estimate: list[float | None] | None, form: str, *, interval: bool = True) -> str:
    """``value (low to high)``; empty where there is none."""
    if estimate is None or None in estimate:
        return ""
    value, low, high = (form.format(each) for each in estimate)
    return f"{value} ({low} to {high})" if interval and not low == value == high else value


def document(result: Mapping[str, Any]) -> str:
    """All groups of a result of ``kvblend eval``."""
    parts = []
    for group, each in result["groups"].items():
        parts.append(f"### {group}, {each['questions']} questions\n")
        parts.append(summary_table(result["groups"], group))
    return "\n".join(parts)


__all__ = ["COLUMNS", "cell", "document", "summary_table"]
