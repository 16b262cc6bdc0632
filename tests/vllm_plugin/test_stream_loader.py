"""The streaming loader without a GPU: its copies made by hand, its kernel in Triton's interpreter."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

# The interpreter must be chosen before Triton is imported, so the check runs in a process of its own.
CHECK = """
import contextlib, ctypes, json, sys
from types import SimpleNamespace

import torch

from kvblend_rag.blend.match import Match
from kvblend_rag.blend.plan import BlendPlan
from kvblend_rag.blend.rope import Rotary
from kvblend_rag.kernels.paged_caches import PagedCaches
from kvblend_rag.store.encoded import encoded
from kvblend_rag.vllm_plugin.worker import host_copies, stream_loader
from kvblend_rag.vllm_plugin.worker.loader import Turns, rotated

# What there is of CUDA: everything in its order, at once.
nothing = lambda *args, **kwargs: None
order = SimpleNamespace(wait_stream=nothing, wait_event=nothing, cuda_stream=0)
torch.cuda.Stream = torch.cuda.current_stream = lambda *args, **kwargs: order
torch.cuda.Event = lambda: SimpleNamespace(record=nothing, query=lambda: True)
torch.cuda.stream = lambda stream: contextlib.nullcontext()
torch.cuda.synchronize = nothing
torch.Tensor.is_pinned = lambda self: True

class Near(torch.Tensor):
    is_cuda = True  # as if it lay on the device

copies, copied_bytes = [], []

def copy(sources, targets, sizes, is_src_access_order_any):
    copies.append(len(sources))
    copied_bytes.append(int(sizes.sum()))
    assert (sizes >= host_copies._LARGE).all()
    for source, target, size in zip(sources.tolist(), targets.tolist(), sizes.tolist(), strict=True):
        ctypes.memmove(target, source, size)

def copy_rows(target, target_pitch, source, source_pitch, width, height, kind, stream):
    copied_bytes.append(width * height)
    assert 0 < width < host_copies._LARGE and width <= min(target_pitch, source_pitch)
    for row in range(height):
        ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)
    return 0

host_copies.ops = SimpleNamespace(swap_blocks_batch=copy)
host_copies.cuda_runtime = stream_loader.cuda_runtime = lambda: SimpleNamespace(cudaMemcpy2DAsync=copy_rows)
host_copies._LARGE = int(sys.argv[3])

generator = torch.Generator().manual_seed(0)
layers, heads, dim, block_size, blocks = 7, 2, 16, 4, 60
angles = torch.rand(400, dim // 2, generator=generator) * 6
wide, narrow = (Rotary(torch.cat([a.cos(), a.sin()], dim=1), False) for a in (angles, angles / 3))
# As Gemma 3 has them: most layers turn one way, some another; and one not at all.
rotaries = [wide, wide, narrow, wide, wide, None, wide]
paged = SimpleNamespace(
    layers=[
        SimpleNamespace(
            name=str(i), rotary=rotary, cache=torch.zeros(blocks, block_size, heads, 2 * dim).transpose(1, 2)
        )
        for i, rotary in enumerate(rotaries)
    ],
    dtype=torch.float32, device=torch.device("cpu"), heads=heads, head_dim=dim, upload=lambda tensor: tensor,
)
paged.caches = PagedCaches([layer.cache for layer in paged.layers])
lengths = [30, 9, 50, 3, 40, 70]
chunks = {}
for i, (length, (encoding, near)) in enumerate(zip(lengths, json.loads(sys.argv[2]))):
    kv = encoded(torch.randn(layers, 2, length, heads, dim, generator=generator), encoding)
    if near:
        kv = kv.as_subclass(Near) if encoding == "none" else kv.moved(kv.buffer.as_subclass(Near))
    chunks[f"c{i}"] = kv
# A chunk twice, and parts of chunks.
runs = (Match("c1", 3, 0, 9), Match("c2", 14, 5, 40), Match("c0", 60, 2, 28), Match("c1", 90, 1, 8))
more = (Match("c3", 125, 0, 3), Match("c5", 130, 7, 63), Match("c4", 195, 1, 35), Match("c5", 240, 2, 1))
plan = BlendPlan(260, runs + more) if len(chunks) > 3 else BlendPlan(120, runs)
rounds = 2 if len(chunks) > 3 else 3
for slot_bytes in json.loads(sys.argv[1]):
    stream_loader._SLOT_BYTES = slot_bytes
    loader = stream_loader.StreamLoader(paged)
    for ask in range(rounds):  # the ring goes on where it stopped
        for layer in paged.layers:
            layer.cache.zero_()
        slots = torch.randperm(blocks * block_size, generator=generator)[: plan.reused_tokens]
        slots[[0, 20, 50]] = -1
        turns = Turns(plan, 11, paged.upload)
        loader.fetch(plan, chunks)
        loader.place(slots, turns)
        for index, layer in enumerate(paged.layers):
            loader.wait(layer.name)
            keys, values = rotated(plan, chunks, turns, index, layer, paged.device)
            expected = torch.zeros_like(layer.cache)
            for token, slot in enumerate(slots.tolist()):
                if slot >= 0:
                    expected[slot // block_size, :, slot % block_size] = torch.cat([keys[token], values[token]], dim=-1)
            torch.testing.assert_close(layer.cache, expected, rtol=1e-5, atol=1e-5)
        loader.wait_for_all()
    asked = sum(
        kv.nbytes for kv in chunks.values() if not kv.is_cuda
    )
    assert sum(copied_bytes) == rounds * asked or slot_bytes < 30_000  # what stands in two batches comes twice
    print(copies)
    copies.clear(), copied_bytes.clear()
"""

# By bytes of a staging slot, how many chunks each copy brings: of one, then of as many layers as turn alike and fit.
COPIES = {
    1 << 20: [3, 3, 3, 6, 3, 3] * 3,
    30_000: [3] * 7 * 3,  # one layer and no more
    20_000: [2, 2] * 7 * 3,  # not a layer
    4_000: [1] * 4 * 7 + [1, 1, 2] * 7 * 2,  # not a chunk: it has grown when the next request comes
}


MIXES = {
    "all": [("int8", False), ("none", False), ("int4", False), ("int4", True), ("fp8", False), ("none", True)],
    "hot": [("int8", True), ("int4", True), ("none", True), ("int4", True), ("fp8", True), ("int4", True)],
    "hot beside": [("int4", True), ("int4", False), ("none", True), ("none", False), ("int8", True), ("int8", False)],
}
"""By name, encoding of each chunk, and whether it lies on the device."""


def arrive(slots, kinds, large=1):
    """Load chunks as these; what was copied in batches of pieces of so many bytes or more, by bytes of a slot."""
    done = subprocess.run(
        [sys.executable, "-c", CHECK, json.dumps(slots), json.dumps(kinds), str(large)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()[-len(slots) :]]


def test_every_token_arrives_rotated():
    assert arrive(list(COPIES), [("none", False)] * 3) == list(COPIES.values())


@pytest.mark.parametrize(("name", "large"), [("all", 2_500), ("hot", 2_500), ("hot beside", 1 << 20)])
def test_encoded_chunks_arrive_decoded(name, large):
    """What is copied in no batch too: all small pieces, and so all of the last."""
    copies = arrive([1 << 20, 3_000], MIXES[name], large)
    assert all(map(bool, copies)) == (name == "all")


def test_without_a_runtime_to_copy_by_the_reason_is_said(monkeypatch):
    from kvblend_rag.errors import ConfigError
    from kvblend_rag.vllm_plugin.worker import host_copies

    monkeypatch.setattr(host_copies, "find_loaded_library", lambda name: None)
    host_copies.cuda_runtime.cache_clear()
    with pytest.raises(ConfigError, match="libcudart"):
        host_copies.cuda_runtime()
