"""One result out of several of ``kvblend eval`` on one model, arms and settings: every question once, tables anew.

For when one sitting is too short for enough questions. A question that several sittings asked counts as the last
of them has it; how far the sittings differ on such questions is kept beside, as the noise between two runs.

    python tools/pool_quality.py FIRST.json SECOND.json --json OUT.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from kvblend_rag.config import BlendConfig
from kvblend_rag.quality import two_chunk
from kvblend_rag.quality.arms import parse_arms
from kvblend_rag.quality.questions import Question
from kvblend_rag.quality.score import Sample
from kvblend_rag.quality.summary import summarise

_SAME = ("engine", "arms")
_VALUES = ("kl", "nll", "f1", "same")


def pooled(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The result of all questions together, in the form of ``kvblend eval``'s.

    Raises:
        ValueError: they are not of one model, engine, arms and settings.
    """
    first, *others = results
    for other in others:
        for name in _SAME:
            if other[name] != first[name]:
                raise ValueError(f"The results differ in {name}: {other[name]} is not {first[name]}.")
        if other["settings"]["ingest_context"] != first["settings"]["ingest_context"]:
            raise ValueError("The results differ in their ingest context.")
    rows = {(row["set"], row["id"]): row for result in results for row in result["samples"]}
    ways = parse_arms(first["arms"], BlendConfig())
    samples = {arm.name: [_sample(row["arms"][arm.name]) for row in rows.values()] for arm in ways}
    questions = [_question(row) for row in rows.values()]
    return {
        **results[-1],
        "seconds": round(sum(result["seconds"] for result in results), 1),
        "settings": {**first["settings"], "questions": len(rows), "no_time": 0},
        "groups": summarise(questions, ways, samples),
        "ttft": {},
        "samples": list(rows.values()),
        "sittings": [{"command": each["command"], "questions": len(each["samples"])} for each in results],
        "between_sittings": _noise(results),
    }


def _question(row: dict[str, Any]) -> Question:
    """As much of it as tables need: its text and documents stay with their data set."""
    needs_two = row["set"] == two_chunk.SET and row["kind"] != "lookup"
    supporting = (0, 1) if needs_two else ()
    return Question(
        id=row["id"], set=row["set"], kind=row["kind"], text="", answers=(), documents=(), supporting=supporting
    )


def _sample(values: dict[str, float]) -> Sample:
    return Sample(**{name: values.get(name, math.nan) for name in Sample.__dataclass_fields__})


def _noise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean absolute differences of questions that the last two sittings both asked, by arm."""
    if len(results) < 2:
        return {}
    before, after = ({(row["set"], row["id"]): row["arms"] for row in each["samples"]} for each in results[-2:])
    both = sorted(before.keys() & after.keys())
    arms: dict[str, dict[str, float]] = {}
    for arm in results[-1]["arms"] if both else ():
        arms[arm] = {
            name: round(float(np.mean([abs(before[key][arm][name] - after[key][arm][name]) for key in both])), 4)
            for name in _VALUES
        }
    return {"questions": len(both), "mean_difference": arms}


def main() -> int:
    """Read, pool, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="JSON of `kvblend eval`")
    parser.add_argument("--json", type=Path, required=True, help="where to write the result")
    given = parser.parse_args()
    try:
        result = pooled([json.loads(file.read_text(encoding="utf-8")) for file in given.results])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    given.json.write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{len(result['samples'])} questions.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
