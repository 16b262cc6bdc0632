"""Two results of ``kvblend eval`` against each other: paired differences over the questions of both.

For what takes an engine of its own, as another ingest context does; or of one result that has the arms behind two
contexts (``--contexts``), or with an option and without it (``--options``).

    python tools/compare_quality.py BEFORE.json AFTER.json --arms reuse question:0.15 --json OUT.json
    python tools/compare_quality.py BEFORE.json AFTER.json --arms plain question:0.15 --json OUT.json  # two models
    python tools/compare_quality.py BOTH.json BOTH.json --contexts long similar --json OUT.json
    python tools/compare_quality.py BOTH.json BOTH.json --options "" carry=0.75 --arms question:0.15 --json OUT.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from kvblend_rag.quality import bootstrap
from kvblend_rag.quality.summary import ALL, MADE_SETS, REAL

MADE = "questions made here"


def compared(
    before: dict[str, Any], after: dict[str, Any], arms: list[str], endings: tuple[str, str] = ("", "")
) -> dict[str, Any]:
    """By group and arm: KL of both and its ratio, what changed in ΔNLL and F1, and how many answers are the full
    prefill's, with 95 % intervals.

    Args:
        before: a result.
        after: another one, or the same.
        arms: as both name them, but for their endings.
        endings: what the names of ``before`` and ``after`` end in.
    """
    rows = [{(row["set"], row["id"]): row["arms"] for row in each["samples"]} for each in (before, after)]
    both = sorted(rows[0].keys() & rows[1].keys())
    places = {ALL: both, REAL: [key for key in both if key[0] not in MADE_SETS]}
    places[MADE] = [key for key in both if key[0] in MADE_SETS]
    groups: dict[str, Any] = {}
    for name, keys in places.items():
        if not keys:
            continue
        groups[name] = {"questions": len(keys), "arms": {}}
        for arm in arms:
            old, new = (
                {value: _column(side, keys, f"{arm}{ending}", value) for value in ("kl", "nll", "f1", "same")}
                for side, ending in zip(rows, endings, strict=True)
            )
            groups[name]["arms"][arm] = {
                "kl_before": bootstrap.mean(old["kl"]).to_list(),
                "kl_after": bootstrap.mean(new["kl"]).to_list(),
                "kl_ratio": _told(bootstrap.ratio(new["kl"], old["kl"])),
                "nll_change_before": bootstrap.mean(old["nll"]).to_list(),
                "nll_change_after": bootstrap.mean(new["nll"]).to_list(),
                "nll_difference": bootstrap.mean(new["nll"] - old["nll"]).to_list(),
                "f1_difference": bootstrap.mean(new["f1"] - old["f1"]).to_list(),
                "same_before": bootstrap.mean(old["same"]).to_list(),
                "same_after": bootstrap.mean(new["same"]).to_list(),
                "same_difference": bootstrap.mean(new["same"] - old["same"]).to_list(),
            }
    return groups


def _told(interval: bootstrap.Interval) -> list[float | None]:
    """Nothing where both are a full prefill's, whose KL is 0."""
    return [None if np.isnan(each) else each for each in interval.to_list()]


def _column(side: dict[Any, Any], keys: list[Any], arm: str, value: str) -> Any:
    """Of each question; ``nll`` as the change to the full prefill of the same sitting."""
    own = np.array([side[key][arm][value] for key in keys])
    return own - np.array([side[key]["plain"][value] for key in keys]) if value == "nll" else own


def main() -> None:
    """Read two results, write the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--arms", nargs="+", default=["reuse", "question:0.15"])
    parser.add_argument("--contexts", nargs=2, default=["", ""], help="that BEFORE's and AFTER's arms name")
    parser.add_argument("--json", type=Path, required=True, help="where to write the result")
    parser.add_argument("--options", nargs=2, default=["", ""], help="the same of a request's options")
    given = parser.parse_args()
    endings = [
        (f":{option}" if option else "") + (f"@{context}" if context else "")
        for option, context in zip(given.options, given.contexts, strict=True)
    ]
    before, after = (json.loads(file.read_text(encoding="utf-8")) for file in (given.before, given.after))
    result = {
        "date": after["date"],
        "machine": after["machine"],
        "engine": after["engine"],
        "before": before["command"],
        "after": after["command"],
        "comparison": compared(before, after, given.arms, (endings[0], endings[1])),
    }
    given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
