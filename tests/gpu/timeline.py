"""Where the milliseconds of a request go: kernels and copies of a Chrome trace, summed by kind.

python tests/gpu/ttft.py OUT.json --timelines DIR && python tests/gpu/timeline.py DIR/*.json
"""

import json
import sys
from pathlib import Path

KINDS = {
    "copy": ("memcpy",),
    "attention": ("flash", "fmha"),
    "gemm": ("gemm", "cutlass", "nvjet", "cublas", "sm90"),
    "between the layers": ("triton",),
}


def kind(name: str) -> str:
    """Of a kernel, by its name."""
    name = name.lower()
    if name == "_kernel":
        return "rotate and scatter"
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def idle(work: list[dict]) -> list[tuple[float, float, str]]:
    """Stretches in which no kernel ran, copies not counted: how long, when, and what came after; microseconds."""
    kernels = sorted((e for e in work if e["cat"] == "kernel"), key=lambda e: e["ts"])
    gaps, begin, end = [], min(e["ts"] for e in work), min(e["ts"] for e in work)
    for event in kernels:
        if event["ts"] > end:
            gaps.append((event["ts"] - end, end - begin, event["name"]))
        end = max(end, event["ts"] + event["dur"])
    return gaps


def main() -> None:
    for file in map(Path, sys.argv[1:]):
        events = json.loads(file.read_text())["traceEvents"]
        work = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") and "dur" in e]
        span = max(e["ts"] + e["dur"] for e in work) - min(e["ts"] for e in work)
        sums: dict[str, float] = {}
        for event in work:
            sums[kind(event["name"])] = sums.get(kind(event["name"]), 0.0) + event["dur"] / 1e3
        print(f"{file.stem}: {span / 1e3:.0f} ms from the first kernel to the last")
        for name, time in sorted(sums.items(), key=lambda item: -item[1]):
            print(f"  {name:<20} {time:7.1f} ms")
        gaps = idle(work)
        print(f"  {'idle':<20} {sum(gap for gap, _, _ in gaps) / 1e3:7.1f} ms, the longest:")
        for gap, at, after in sorted(gaps, reverse=True)[:5]:
            print(f"    {gap / 1e3:6.2f} ms at {at / 1e3:7.1f} ms, before {after[:80]}")


if __name__ == "__main__":
    main()
