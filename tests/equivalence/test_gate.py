"""Seven planted faults, seven refusals, over ten seeds; and sound models are accepted over ten seeds.

Six faults are in stored files with valid checksums, read by a real engine. The seventh is a real model whose
next tokens hang so much on what its chunks see of each other that nothing short of a prefill keeps them.
"""

import dataclasses

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from kvblend_rag.blend.rope import rotate
from kvblend_rag.quality.judge import judge
from kvblend_rag.quality.measure import compare, measure
from kvblend_rag.quality.observe import prepare
from kvblend_rag.quality.prompt import renderer
from kvblend_rag.quality.two_chunk import two_chunk_questions

SEEDS = range(10)
# A measurement of answers takes ten seconds; the rest of the ten seeds is for the whole matrix.
MEASURED = [pytest.param(seed, marks=[pytest.mark.full] if seed > 1 else []) for seed in SEEDS]
ARMS = ("reuse", "question:0.2", "question:0.5")


def turned(kv, _other, _seed):
    """Keys turned by one position too many, and at other frequencies than the model's."""
    half, tokens = kv.shape[-1] // 2, kv.shape[2]
    angle = (1.0 / 10_000 ** (torch.arange(half) / half)).expand(tokens, half)
    return torch.stack([rotate(kv[:, 0], angle.cos(), angle.sin(), False), kv[:, 1]], dim=1)


def shifted(kv, _other, seed):
    """Every token's KV a token or a few further on."""
    return kv.roll(1 + seed % 3, dims=2)


def without_a_layer(kv, _other, seed):
    kv = kv.clone()
    kv[seed % len(kv)] = 0
    return kv


def swapped(_kv, other, _seed):
    """Another chunk's KV."""
    return other


def coarse(kv, _other, _seed):
    """Four bits a number, a scale a token and head."""
    scale = kv.abs().amax(-1, keepdim=True) / 7
    return (kv / scale).round() * scale


FAULTS = {
    "wrong rotation": turned,
    "shifted chunk": shifted,
    "missing layer": without_a_layer,
    "swapped chunks": swapped,
    "quantised too coarsely": coarse,
}


@pytest.fixture(scope="module")
def rig(rigs):
    return rigs.get("llama", blocks=24, local_device="disk")


@pytest.fixture(scope="module")
def foreign(tiny_model):
    """KV that another model of the same shape computes for tokens behind a context."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model("mistral"), dtype=torch.float32)

    @torch.inference_mode()
    def kv(context, chunk):
        tokens = torch.tensor([[*context, *chunk.tolist()]])
        cache = model(tokens, use_cache=True).past_key_values
        layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
        return torch.stack(layers)[:, :, :, len(context) :].transpose(2, 3)

    return kv


def chunks_of(rig, seed):
    """Two chunks of equal length, stored, and what the store holds of them."""
    length = int(np.random.default_rng(seed).integers(60, 200))
    chunks = [rig.tokens(length, 90_000 + 10 * seed + number) for number in range(2)]
    rig.store(*chunks)
    return chunks, [rig.stored(each) for each in chunks]


def deviation(rig, chunks):
    return compare(rig.llm.kvblend, [(rig.key(each), each) for each in chunks])


@pytest.fixture(scope="module")
def sound(rigs):
    """What a model that blends gives, measured on an engine: in one layer, KV hangs on nothing before it."""
    return measured(rigs.get("llama-one-layer", ingest_context="none", local_device="disk"), 0)


def measured(rig, seed):
    kv = rig.llm.kvblend
    render = renderer(kv.engine, "Answer from the documents.")
    asked = prepare(kv.engine, two_chunk_questions(3, documents=4, seed=seed), render)
    return measure(kv, asked, render, arms=ARMS, progress=False)[0]


@pytest.mark.parametrize("seed", MEASURED)
def test_a_sound_model_is_accepted(rigs, sound, seed):
    rig = rigs.get("llama-one-layer", ingest_context="none", local_device="disk") if seed else None
    verdict = judge(measured(rig, seed) if rig is not None else sound)
    assert verdict.accepted, verdict.reason


@pytest.mark.parametrize("seed", SEEDS)
def test_a_sound_store_is_no_fault_and_every_planted_one_is(rig, foreign, sound, seed):
    chunks, stored = chunks_of(rig, seed)
    fine = deviation(rig, chunks)
    assert fine.error < 1e-3
    assert judge(dataclasses.replace(sound, deviation=fine)).accepted
    planted = {name: fault(stored[0], stored[1], seed) for name, fault in FAULTS.items()}
    planted["another model's KV"] = foreign(rig.info.context, chunks[0])
    for name, kv in planted.items():
        assert kv.shape == stored[0].shape
        rig.rewrite(chunks[0], kv)
        verdict = judge(dataclasses.replace(sound, deviation=deviation(rig, chunks)))
        assert not verdict.accepted, name
        assert verdict.reason.startswith("stored KV is not what the model computes"), name
    rig.rewrite(chunks[0], stored[0])
    assert judge(dataclasses.replace(sound, deviation=deviation(rig, chunks))).accepted


def test_eight_bits_are_fine_enough(rig, sound):
    chunks, stored = chunks_of(rig, 99)
    scale = stored[0].abs().amax(-1, keepdim=True) / 127
    rig.rewrite(chunks[0], (stored[0] / scale).round() * scale)
    found = deviation(rig, chunks)
    assert found.error > 1e-3
    assert judge(dataclasses.replace(sound, deviation=found)).accepted


@pytest.mark.parametrize("seed", MEASURED)
def test_a_model_that_does_not_blend_is_refused(rig, seed):
    verdict = judge(measured(rig, seed))
    assert not verdict.accepted
    assert "blending keeps too little" in verdict.reason
