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
from kvblend_rag.vllm_plugin.worker import stream_loader
from kvblend_rag.vllm_plugin.worker.loader import Turns, rotated

# What there is of CUDA: everything in its order, at once.
nothing = lambda *args, **kwargs: None
order = SimpleNamespace(wait_stream=nothing, wait_event=nothing)
torch.cuda.Stream = torch.cuda.current_stream = lambda *args, **kwargs: order
torch.cuda.Event = lambda: SimpleNamespace(record=nothing, query=lambda: True)
torch.cuda.stream = lambda stream: contextlib.nullcontext()
torch.cuda.synchronize = nothing
torch.Tensor.is_pinned = lambda self: True

copies = []

def copy(sources, targets, sizes, is_src_access_order_any):
    copies.append(len(sources))
    for source, target, size in zip(sources.tolist(), targets.tolist(), sizes.tolist(), strict=True):
        ctypes.memmove(target, source, size)

stream_loader.ops = SimpleNamespace(swap_blocks_batch=copy)

generator = torch.Generator().manual_seed(0)
layers, heads, dim, block_size, blocks = 7, 2, 16, 4, 40
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
lengths = [30, 9, 50]
chunks = {
    f"c{i}": torch.randn(layers, 2, length, heads, dim, generator=generator) for i, length in enumerate(lengths)
}
# A chunk twice, and parts of chunks.
runs = (Match("c1", 3, 0, 9), Match("c2", 14, 5, 40), Match("c0", 60, 2, 28), Match("c1", 90, 1, 8))
plan = BlendPlan(120, runs)
for slot_bytes in json.loads(sys.argv[1]):
    stream_loader._SLOT_BYTES = slot_bytes
    loader = stream_loader.StreamLoader(paged)
    for ask in range(3):  # the ring goes on where it stopped
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
    print(copies)
    copies.clear()
"""

# By bytes of a staging slot, how many chunks each copy brings: of one, then of as many layers as turn alike and fit.
COPIES = {
    1 << 20: [3, 3, 3, 6, 3, 3] * 3,
    30_000: [3] * 7 * 3,  # one layer and no more
    20_000: [2, 2] * 7 * 3,  # not a layer
    4_000: [1] * 4 * 7 + [1, 1, 2] * 7 * 2,  # not a chunk: it has grown when the next request comes
}


def test_every_token_arrives_rotated():
    done = subprocess.run(
        [sys.executable, "-c", CHECK, json.dumps(list(COPIES))],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    shown = done.stdout.splitlines()[-len(COPIES) :]
    assert [json.loads(line) for line in shown] == list(COPIES.values())
