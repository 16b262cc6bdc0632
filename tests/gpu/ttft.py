"""On a GPU: `kvblend bench gpu` without the command line's packages.

python tests/gpu/ttft.py OUT.json [--shape NAME] [--lengths N …] [--spans N …] [--repeats N] [--eager] [--timelines DIR]
    [--load SECONDS] [--sweep N …] [--device-gb GIB] [--encoding NAME]
"""

import argparse
import json
from pathlib import Path


def main() -> None:
    from kvblend_rag.commands import bench_gpu

    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--spans", type=int, nargs="+", default=[64, 16])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--timelines", type=Path, help="folder for Chrome traces")
    parser.add_argument("--load", type=float, default=0.0, help="seconds of each run under load")
    parser.add_argument("--sweep", type=int, nargs="+", default=[], help="lengths at which budgets are compared")
    parser.add_argument("--device-gb", type=float, default=0.0, help="of GPU memory for chunks that have got hot")
    parser.add_argument("--encoding", default="none", help="as which chunks are kept")
    given = parser.parse_args()

    def keep(result: dict) -> None:
        given.out.write_text(json.dumps(result, indent=1))

    result = bench_gpu.run(
        given.shape,
        given.lengths,
        given.spans,
        given.repeats,
        given.timelines,
        given.load,
        given.sweep,
        given.device_gb,
        given.encoding,
        keep,
        enforce_eager=given.eager,
    )
    keep(result)
    for kind in ("results", "hot", "sweep"):
        for length, rows in result[kind].items():
            for name, row in rows.items():
                steps = {step: round(time, 1) for step, time in row["host_ms"].items()}
                times = f"{row['median_ms']:8.1f} ms  {row['speedup']:5.2f}x"
                print(f"{kind:<8}{length:>6} {name:<32} {times}  {steps} {row['tiers']}")


if __name__ == "__main__":
    main()
