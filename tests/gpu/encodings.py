"""On a GPU: encoded chunks, decoded by the kernel that loads them, against the same as computed.

    python tests/gpu/encodings.py OUT.json [--encodings NAME …] [--lengths N …] [--repeats N] [--shape NAME] [--graphs]
        [--no-engine]

First, without an engine, what the streaming loader leaves in a paged cache of the shape's layers (``exact``): its
largest difference from decoding and turning on the host, and from the kernel for KV as computed, given the decoded
chunks; and how long loads take on their own (``loads``). Then, by encoding, one engine with random weights: time to
first token of plain vLLM, reuse alone, ``first`` and ``question`` at 10 %, interleaved; the bytes that a prompt reads
from host memory and copies; the bytes of host memory a token; and how far a loaded chunk is from the computed one
(``WorkerSide.audit``). OUT.json is written anew after each part. A script, since CI has no GPU.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

ENCODINGS = ("none", "int8", "fp8", "int4")
ARMS = {
    "plain": {"blend": False},
    "reuse only": {"selector": "none"},
    "first 10 %, spans of 64": {"selector": "first", "ratio": 0.1, "span": 64},
    "question 10 %, spans of 64": {"selector": "question", "ratio": 0.1, "span": 64},
}
DEVICE = "cuda"
CHUNKS, TOKENS = 8, 1000
"""Of the check without an engine."""


def paged_cache(layers: int, heads: int, dim: int, tokens: int):
    """As much of vLLM's paged cache as a loader looks at, laid out as FlashAttention has it."""
    from types import SimpleNamespace

    import torch

    from kvblend_rag.blend.rope import Rotary
    from kvblend_rag.kernels.paged_caches import PagedCaches
    from kvblend_rag.vllm_plugin.worker.upload import Upload

    device, block_size = torch.device(DEVICE), 16
    positions = torch.arange(tokens + 4096)[:, None] * 500_000.0 ** -(torch.arange(0, dim, 2) / dim)
    table = torch.cat([positions.cos(), positions.sin()], dim=1).to(device, torch.bfloat16)
    blocks = -(-tokens // block_size) + 1
    physical = torch.zeros(layers, blocks, block_size, heads, 2 * dim, dtype=torch.bfloat16, device=device)
    paged = SimpleNamespace(
        layers=[
            SimpleNamespace(name=str(index), rotary=Rotary(table, False), cache=cache.transpose(1, 2))
            for index, cache in enumerate(physical)
        ],
        dtype=torch.bfloat16,
        device=device,
        heads=heads,
        head_dim=dim,
        block_size=block_size,
        upload=Upload(device),
    )
    paged.caches = PagedCaches([layer.cache for layer in paged.layers])
    return paged, physical


def loaded(loader, plan, chunks, slots, paged):
    """Load a request, and how long it took, in milliseconds."""
    import torch

    from kvblend_rag.vllm_plugin.worker.loader import Turns

    torch.cuda.synchronize()
    started = time.perf_counter()
    turns = Turns(plan, 0, paged.upload)
    loader.fetch(plan, chunks)
    loader.place(slots, turns)
    for layer in paged.layers:
        loader.wait(layer.name)
    loader.wait_for_all()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3


def on_device(kv):
    """A chunk as ``HotChunks`` has it."""
    from kvblend_rag.store.encoded import EncodedKV

    return kv.moved(kv.buffer.to(DEVICE)) if isinstance(kv, EncodedKV) else kv.to(DEVICE)


def compared(found, wanted) -> dict:
    """Keys and values of all layers, (layers, tokens, heads, 2 * dim) each."""
    dim = found.shape[-1] // 2
    result = {}
    for name, part in (("keys", slice(0, dim)), ("values", slice(dim, 2 * dim))):
        differences = (found[..., part].float() - wanted[..., part].float()).abs()
        result[name] = {
            "max_abs": differences.max().item(),
            "max_abs_of_kv": wanted[..., part].float().abs().max().item(),
            "share_that_differs": (differences > 0).float().mean().item(),
        }
    return result


def without_engine(shape: dict, encodings: list[str], lengths: list[int]) -> dict:
    """``exact`` and ``loads``, see the module."""
    import torch

    from kvblend_rag.blend.match import Match
    from kvblend_rag.blend.plan import BlendPlan
    from kvblend_rag.store.encoded import EncodedKV, encoded
    from kvblend_rag.vllm_plugin.worker.loader import Turns, rotated
    from kvblend_rag.vllm_plugin.worker.stream_loader import StreamLoader

    layers, heads = shape["num_hidden_layers"], shape["num_key_value_heads"]
    dim = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
    generator = torch.Generator(DEVICE).manual_seed(0)
    kvs = []
    for _ in range(CHUNKS):
        kv = torch.randn(layers, 2, TOKENS, heads, dim, generator=generator, device=DEVICE)
        kv[:, 0, :, :, ::7] *= 10
        kv[:, 1, ::5] *= 10
        kvs.append(kv.bfloat16().cpu())
    stored = {name: [encoded(kv, name).pin_memory() for kv in kvs] for name in encodings}
    paged, physical = paged_cache(layers, heads, dim, max(max(lengths), 2 * CHUNKS * TOKENS))
    loader, result = StreamLoader(paged), {"exact": {}, "loads": {}}

    # Whole chunks, parts that begin inside of groups, few tokens, and one chunk twice.
    parts = [
        (0, 0, TOKENS),
        (1, 0, 333),
        (2, 1, TOKENS - 1),
        (3, 5, 500),
        (4, 37, 64),
        (5, 0, 3),
        (6, 2, 1),
        (0, 700, 300),
    ]
    runs, start = [], 16
    for chunk, first, length in parts:
        runs.append(Match(f"c{chunk}", start, first, length))
        start += length + 1
    plan = BlendPlan(start + 32, tuple(runs))
    slots = torch.randperm(physical.shape[1] * 16, generator=torch.Generator().manual_seed(1))[: plan.reused_tokens]
    slots[::97] = -1
    cases = {f"{name}, {where}": [(name, where)] * CHUNKS for name in encodings for where in ("staged", "hot")}
    cases["mixed"] = [(encodings[i % len(encodings)], ("staged", "hot")[i // 2 % 2]) for i in range(CHUNKS)]
    for case, kinds in cases.items():
        chosen = [stored[name][index] for index, (name, _) in enumerate(kinds)]
        chunks = {
            f"c{index}": on_device(kv) if where == "hot" else kv
            for index, (kv, (_, where)) in enumerate(zip(chosen, kinds, strict=True))
        }
        found = {}
        plain = {
            f"c{index}": (kv.decode() if isinstance(kv, EncodedKV) else kv).pin_memory()
            for index, kv in enumerate(chosen)
        }
        for name, given in (("kernel", chunks), ("decoded on the host", plain)):
            physical.zero_()
            loaded(loader, plan, given, slots, paged)
            found[name] = physical.clone()
        wanted = torch.zeros_like(physical)
        turns, kept = Turns(plan, 0, paged.upload), slots[slots >= 0].to(DEVICE)
        for index, layer in enumerate(paged.layers):
            # Decoded on the host, turned by PyTorch.
            pair = torch.cat(rotated(plan, plain, turns, index, layer, paged.device), dim=-1)
            wanted[index].view(-1, heads, 2 * dim)[kept] = pair[slots.to(DEVICE) >= 0]
        result["exact"][case] = {
            "against decoding and turning on the host": compared(found["kernel"], wanted),
            "against the kernel for KV as computed": compared(found["kernel"], found["decoded on the host"]),
        }
        print(case, json.dumps(result["exact"][case]), flush=True)
    for name in encodings:
        for length in lengths:
            count = length // (TOKENS + 1)
            runs = tuple(Match(f"c{i}", 16 + i * TOKENS, 0, TOKENS) for i in range(count))
            plan, slots = BlendPlan(length, runs), torch.arange(count * TOKENS) + 16
            for where in ("staged", "hot"):
                held = stored[name] if where == "staged" else [on_device(kv) for kv in stored[name]]
                chunks = {f"c{i}": held[i % CHUNKS] for i in range(count)}
                taken = [loaded(loader, plan, chunks, slots, paged) for _ in range(6)][1:]
                row = {"median_ms": statistics.median(taken), "bytes": sum(kv.nbytes for kv in chunks.values())}
                result["loads"].setdefault(str(length), {})[f"{name}, {where}"] = row
                print(length, name, where, row, flush=True)
    return result


def with_engine(shape: str, encoding: str, lengths: list[int], repeats: int, eager: bool) -> dict:
    """One engine, one encoding."""
    from kvblend_rag.blend.chunk import chunk_key
    from kvblend_rag.commands import bench_gpu
    from kvblend_rag.commands.shapes import write_shape
    from kvblend_rag.config import BlendConfig
    from kvblend_rag.llm import LLM

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        config = BlendConfig(
            store_path=str(Path(folder) / "store"),
            ingest_context="none",
            chunk_size=bench_gpu.CHUNK_TOKENS,
            max_memory_gb=40.0,
            planner=False,
            encoding=encoding,
        )
        options = {"load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": max(lengths) + 64}
        started = time.perf_counter()
        with LLM(write_shape(shape, Path(folder) / shape), config=config, enforce_eager=eager, **options) as llm:
            engine = llm.kvblend.engine
            found = {"refusal": engine.info.refusal, "start_seconds": time.perf_counter() - started, "results": {}}
            tokens = 0
            for length in lengths:
                rows = found["results"][str(length)] = bench_gpu._measure(llm, length, ARMS, repeats, rng)
                chunks = bench_gpu._library(llm, length, rng)
                tokens += 2 * len(chunks) * len(chunks[0])  # as many were ingested to be measured
                engine.run(engine.reset_prefix_cache())
                prompt = bench_gpu._prompt(chunks, length, rng)
                report = llm.generate(prompt, engine.one_token(), blend=ARMS["reuse only"])[0].report
                rows["reuse only"]["bytes_copied"] = sum(load.bytes for load in report.loads)
                rows["reuse only"]["reason"] = report.reason
            held = {tier["tier"]: tier["bytes"] for tier in engine.run(engine.call("tiers"))[0]}
            found["memory_bytes_per_token"], found["disk_bytes_per_token"] = (
                held["memory"] / tokens,
                held["disk"] / tokens,
            )
            engine.run(engine.reset_prefix_cache())
            key = chunk_key(llm.kvblend.namespace, chunks[0])
            found["audit"] = engine.run(engine.call("audit", key, chunks[0].tolist()))[0]
            engine.run(engine.reset_prefix_cache())
            found["engine"], found["dtype"] = engine.info.version, engine.info.dtype
            found["seconds"] = time.perf_counter() - started
    return found


def main() -> None:
    from kvblend_rag.commands import bench_gpu
    from kvblend_rag.commands.shapes import SHAPES

    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--encodings", nargs="+", default=list(ENCODINGS), choices=ENCODINGS)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--graphs", action="store_true", help="capture CUDA graphs, which takes longer to start")
    parser.add_argument("--no-engine", action="store_true", help="only what needs none")
    given = parser.parse_args()
    result = {
        "shape": given.shape,
        "eager": not given.graphs,
        "command": " ".join([sys.argv[0], *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "encodings": {},
    }
    # In a process of its own, so that the engines find the GPU as they would without.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result |= pool.apply(without_engine, (SHAPES[given.shape], given.encodings, given.lengths))
        result["machine"] = pool.apply(bench_gpu._machine)
        result["machine"] |= {name: version(name) for name in ("vllm", "triton")}
    given.out.write_text(json.dumps(result, indent=1))
    for encoding in [] if given.no_engine else given.encodings:
        found = with_engine(given.shape, encoding, given.lengths, given.repeats, not given.graphs)
        result["encodings"][encoding] = found
        given.out.write_text(json.dumps(result, indent=1))
        print(f"{encoding}: {found['memory_bytes_per_token']:,.0f} bytes a token, {found['seconds']:.0f} s", flush=True)
        for length, rows in found["results"].items():
            for name, row in rows.items():
                times = f"{row['median_ms']:8.1f} ms  {row['speedup']:5.2f}x"
                print(f"{length:>6} {name:<26}{times}  {row.get('bytes_copied', '')} {row['tiers']}", flush=True)


if __name__ == "__main__":
    main()
