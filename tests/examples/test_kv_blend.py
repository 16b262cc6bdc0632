"""The descendant of CacheBlend's first script, run as a user would: no main guard, the spawn start method."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module", autouse=True)
def one_engine_at_a_time(rigs):
    rigs.close()


def test_the_configuration_is_the_one_of_the_first_script():
    settings = yaml.safe_load((EXAMPLES / "kv_blend.yaml").read_text())
    assert settings == {"chunk_size": 256, "local_device": "cpu", "enable_blending": True}


def test_the_script_answers_from_blended_chunks(tmp_path):
    script = EXAMPLES / "kv_blend.py"
    assert "__main__" not in script.read_text()
    ran = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=800,
        cwd=tmp_path,
        env={
            **os.environ,
            "KVBLEND_CONFIG_FILE": str(EXAMPLES / "kv_blend.yaml"),
            "KVBLEND_STORE_PATH": str(tmp_path / "store"),
            "KVBLEND_PLANNER": "false",  # on a busy machine it may well find that loading does not pay
            # An engine compiles for a minute, and seven tenths of the memory are not always free beside the tests' own
            # processes: what is tested here is the script.
            "KVBLEND_ENGINE_ARGS": "{enforce_eager: true, max_model_len: 4096, kv_cache_memory_bytes: 1073741824}",
            "VLLM_LOGGING_LEVEL": "ERROR",
        },
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "19.45" in ran.stdout
    ttft = re.search(r"Time to first token: ([\d.]+) seconds", ran.stdout)
    assert ttft
    assert float(ttft[1]) > 0
    tokens = re.search(r"(\d+) prompt tokens: (\d+) reused, (\d+) recomputed", ran.stdout)
    assert tokens
    assert int(tokens[2]) + int(tokens[3]) > 0.8 * int(tokens[1])
    assert ran.stdout.count("Answer:") == 1  # no child ran the script again


def test_a_model_that_is_not_there(tmp_path):
    ran = subprocess.run(
        [sys.executable, str(EXAMPLES / "kv_blend.py"), str(tmp_path / "none")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 1
    assert "ModelNotFound: There is no model at" in ran.stderr.splitlines()[-1]
