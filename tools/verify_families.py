"""Verify families of models and combinations of options on tiny random weights; writes docs/results/models.json.

``kvblend verify``'s checks, on an engine for each of the tests' families (tests/conftest.py) and combinations. What
is given on the command line is run and replaces what the file has of it; the documentation's support table is made
from the file by docs/generate.py.

    python tools/verify_families.py            all of them
    python tools/verify_families.py gemma3     some
    python tools/verify_families.py --dtype bfloat16 --compiled --engine '{"num_gpu_blocks_override": 1024}' \
        --file docs/results/models-gpu.json    on a GPU, whose blocks are small
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import shlex
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm.auto import tqdm

from kvblend_rag.commands import verify
from kvblend_rag.commands.machine import machine
from kvblend_rag.demo.library import BUNDLED, load_documents
from kvblend_rag.errors import KVBlendError

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "results" / "models.json"
LENGTHS = (200, 500, 1000)
_TEXTS = 10
"""Of the bundled documents: what the longest prompt takes, and some more."""


def main() -> int:
    """Run; 0 when all that is served is equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="families and combinations; all when not given")
    parser.add_argument("--file", type=Path, default=FILE, help="where the results are kept")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compiled", action="store_true", help="with vLLM's compiler and, on a GPU, its graphs")
    parser.add_argument("--engine", type=json.loads, default={}, help="more of vLLM's engine arguments, as JSON")
    given = parser.parse_args()
    names, setup = given.names, {"dtype": given.dtype, "compiled": given.compiled}
    tiny = _tests()
    known = {**{name: (name, {}) for name in tiny.FAMILIES}, **tiny.COMBINATIONS}
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"{unknown[0]} is neither of {', '.join(known)}")
    failed = []
    with tempfile.TemporaryDirectory(prefix="kvblend-families-") as folder:
        rigs = tiny._Rigs(Path(folder))
        with contextlib.closing(rigs):
            for name in tqdm(names or list(known), desc="Verifying"):
                try:
                    family, arguments = known[name]
                    result = _verified(tiny, rigs, family, {**arguments, **given.engine}, setup)
                except KVBlendError as error:
                    print(f"{name}: {error}", file=sys.stderr)
                    failed.append(name)
                    continue
                result["command"] = _command(names)
                _keep(given.file, name, result, "combinations" if name in tiny.COMBINATIONS else "families")
                failed += [] if result["refusal"] or result["equal"] else [name]
    if failed:
        print(f"Not equal: {', '.join(failed)}.", file=sys.stderr)
    return 1 if failed else 0


def _command(names: list[str]) -> str:
    """As it was given, but for the names."""
    return shlex.join(["python", "tools/verify_families.py", *(each for each in sys.argv[1:] if each not in names)])


def _tests() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kvblend_tests_conftest", ROOT / "tests" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _verified(
    tiny: ModuleType, rigs: Any, family: str, arguments: dict[str, Any], setup: dict[str, Any]
) -> dict[str, Any]:
    # On disk alone, as `kvblend verify` has it.
    rig = rigs.get(family, engine=arguments or None, local_device="disk", **setup)
    info = rig.info
    facts = {
        "family": family,
        "architecture": info.architectures[0],
        "refusal": info.refusal,
        "engine": info.version,
        "device": info.device,
        "gpu": machine().get("gpu"),
        "dtype": info.dtype,
        "compiled": setup["compiled"],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "options": {**tiny.ARGUMENTS.get(family, {}), **arguments},
    }
    if info.refusal is not None:
        return {**facts, "checks": [], "equal": None}
    texts = [document.content for document in load_documents(BUNDLED)][:_TEXTS]
    result = verify.check(rig.llm, texts, LENGTHS)
    for check in result["checks"]:  # a damaged chunk is named with its place, which is gone tomorrow
        check["remark"] = check["remark"].replace(str(rigs._folder), "…")
    return {**facts, **{key: result[key] for key in ("tolerance", "tolerance_reason", "checks", "equal")}}


def _keep(file: Path, name: str, result: dict[str, Any], part: str) -> None:
    """At once, so that what was run is not lost to what comes after."""
    kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    kept["machine"] = machine()
    kept.setdefault(part, {})[name] = result
    file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
