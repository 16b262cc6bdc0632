"""Kernels in Triton's interpreter, which must be chosen before Triton is imported: so in a process of its own."""

import importlib.util
import json
import os
import subprocess
import sys

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


@pytest.fixture(scope="module")
def wrong(request: pytest.FixtureRequest) -> dict[str, str | None]:
    """What went wrong, by case of the module's CASES, in the ``check(**case)`` that its CHECK defines.

    All cases go through one process: importing takes longer than most of them.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    cases = request.module.CASES
    done = subprocess.run(
        [sys.executable, "-c", request.module.CHECK + _EACH, json.dumps(cases)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = dict(json.loads(line) for line in done.stdout.splitlines()[-len(cases) :])
    assert found.keys() == cases.keys()
    return found
