"""Kernels in Triton's interpreter, which must be chosen before Triton is imported: so in a process of its own."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest

_EACH = """
import json, sys, traceback

for name, case in json.loads(sys.argv[1]).items():
    try:
        check(**case)
        wrong = None
    except Exception:
        wrong = traceback.format_exc()
    print(json.dumps([name, wrong]), flush=True)
"""


@pytest.fixture(scope="session")
def interpreted() -> Callable[[str, Mapping[str, Mapping[str, Any]]], dict[str, str | None]]:
    """``interpreted(program, cases)``: what went wrong, by case, in a ``check(**case)`` that the program defines.

    All cases go through one process: importing takes longer than most of them.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")

    def run(program: str, cases: Mapping[str, Mapping[str, Any]]) -> dict[str, str | None]:
        done = subprocess.run(
            [sys.executable, "-c", program + _EACH, json.dumps(cases)],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found = dict(json.loads(line) for line in done.stdout.splitlines()[-len(cases) :])
        assert found.keys() == cases.keys()
        return found

    return run
