"""On a GPU: batched copies out of page-locked memory (cuMemcpyBatchAsync), by how many and how large their pieces are.

    python tests/gpu/batched_copies.py OUT.json [--seconds N] [--at-once N]

A call after the other, each waited for; whether CUDA's context outlived them, and whether what arrived is what was
sent. Each row in a process of its own, since a context that ended takes its process along. ``host_copies.py`` goes by
what came out. A script, since CI has no GPU.
"""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

ROWS = (
    # pieces a call, least and most bytes of one, what sizes and addresses are multiples of
    (800, 256, 30_000, 4),
    (800, 256, 30_000, 128),
    (800, 20_000, 30_000, 16),
    (800, 256, 4_000, 4),
    (100, 256, 30_000, 4),
    (800, 32_768, 65_536, 16),
    (800, 65_536, 131_072, 4),
    (800, 65_536, 131_072, 128),
    (100, 65_536, 1_048_576, 4),
)
HOST_BYTES, DEVICE_BYTES = 256 << 20, 256 << 20
COMPARED = 400
"""Every so many calls."""


def batches(pieces: int, least: int, most: int, unit: int, seconds: float) -> dict:
    """What came of one row."""
    import numpy as np
    import torch
    from vllm import _custom_ops as ops

    host = torch.empty(HOST_BYTES, dtype=torch.uint8, pin_memory=True).random_(0, 256)
    device = torch.empty(DEVICE_BYTES, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_stream(torch.cuda.Stream())
    rng, calls, started = np.random.default_rng(0), 0, time.monotonic()
    while time.monotonic() - started < seconds:
        sizes = rng.integers(-(-least // unit), most // unit + 1, pieces) * unit
        sources = rng.integers(0, (HOST_BYTES - most) // unit, pieces) * unit
        steps = -(-sizes // 16) * 16
        targets = np.cumsum(steps) - steps
        calls += 1
        ops.swap_blocks_batch(
            torch.from_numpy(sources + host.data_ptr()),
            torch.from_numpy(targets + device.data_ptr()),
            torch.from_numpy(sizes),
            is_src_access_order_any=True,
        )
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            return {"calls": calls, "fault": str(error).splitlines()[0]}
        if calls % COMPARED == 1:
            arrived = device.cpu()
            for source, target, size in zip(sources, targets, sizes, strict=True):
                if not torch.equal(arrived[target : target + size], host[source : source + size]):
                    return {"calls": calls, "fault": "other bytes arrived than were sent"}
    return {"calls": calls, "fault": None}


def row(given: tuple[int, int, int, int], seconds: float) -> dict:
    """The same in a process of its own."""
    code = f"import json, batched_copies as b; print(json.dumps(b.batches(*{given}, {seconds})), flush=True)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    named = dict(zip(("pieces", "least", "most", "multiples_of"), given, strict=True))
    result = {**named, **(found[-1] if found else {"calls": None, "fault": done.stderr[-300:]})}
    print(json.dumps(result), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=30.0, help="a row")
    parser.add_argument("--at-once", type=int, default=3, help="rows, each in a process")
    given = parser.parse_args()
    with ThreadPoolExecutor(given.at_once) as pool:
        rows = list(pool.map(lambda each: row(each, given.seconds), ROWS))
    import torch

    smi = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(),
        "driver": subprocess.run(smi, capture_output=True, text=True).stdout.strip(),
        "versions": {name: version(name) for name in ("torch", "vllm")},
        "rows": rows,
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
