"""What people combine blending with works as on plain vLLM, or gets an ordinary prefill and the reason.

A row is an engine, what a request asks for, and what comes of it. The engines are those of ``COMBINATIONS`` in
conftest.py, behind the one of test_families, which is all that `make test` starts.
"""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

TOLERANCE = 1e-4
# In bfloat16 plain vLLM differs from itself in another batch, by 2e-4 here (docs/results/models.json).
SIXTEEN_BITS = 0.02
BLENDED = None
SHARED = "shared"
ADAPTER = "an adapter"

ADAPTERS, NGRAMS = "adapters", "speculation from n-grams"
OTHER_STEPS = "whole prompts, priorities, embeddings"
INT8, FOUR_BITS = "weights in eight bits", ("weights in four bits (GPTQ)", "weights in four bits (AWQ)")
ENGINES = (SHARED, ADAPTERS, NGRAMS, OTHER_STEPS, "no prefix cache", INT8, *FOUR_BITS, "data parallelism")


@dataclasses.dataclass(frozen=True)
class Row:
    """One combination."""

    engine: str
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of vLLM's ``SamplingParams``."""
    request: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of vLLM's ``generate``."""
    reason: str | None = BLENDED
    """Why there is an ordinary prefill."""


ROWS = {
    "structured output": Row(SHARED, {"structured_outputs": {"regex": r"[a-z]{4} [0-9]{12}"}}),
    # Drawn from one candidate; a seed would end vLLM 0.32's engine on a CPU ("CPU Generator does not use offset").
    "several answers": Row(SHARED, {"n": 3, "temperature": 0.8, "top_k": 1}),
    "penalties on prompt tokens": Row(SHARED, {"repetition_penalty": 1.3, "presence_penalty": 0.4}),
    "a token made likelier": Row(SHARED, {"logit_bias": {300: 4.0}, "min_tokens": 4}),
    "log-probabilities of the prompt": Row(
        SHARED, {"prompt_logprobs": 1}, reason="prompt log-probabilities need an ordinary prefill"
    ),
    "adapters enabled": Row(ADAPTERS),
    "adapter asked for": Row(ADAPTERS, request={"lora_request": ADAPTER}, reason="the request uses a LoRA adapter"),
    "speculation from n-grams": Row(NGRAMS),
    "speculation and structured output": Row(NGRAMS, {"structured_outputs": {"regex": r"[a-z]{4} [0-9]{12}"}}),
    "chunked prefill off": Row(OTHER_STEPS),
    "a priority": Row(OTHER_STEPS, request={"priority": 3}),
    "prefix cache off": Row("no prefix cache"),
    **{name: Row(name) for name in (INT8, *FOUR_BITS)},
    "data parallelism": Row("data parallelism"),
}


@pytest.fixture(scope="module", params=ENGINES)
def rig(request, rigs, combinations, amx):
    if request.param == SHARED:
        return rigs.get("llama", blocks=24, local_device="disk")
    if request.param == INT8 and amx:
        pytest.skip("vLLM's eight-bit weights on a CPU with AMX take no float32")
    family, arguments = combinations[request.param]
    return rigs.get(family, engine=arguments)


def _rows():
    for engine in ENGINES:
        for name, row in ROWS.items():
            if row.engine == engine:
                marks = [] if engine == SHARED else [pytest.mark.full]
                yield pytest.param(engine, row, id=name, marks=marks)


@pytest.mark.parametrize(("rig", "row"), _rows(), indirect=["rig"])
def test_a_combination(rig, row, tmp_path_factory):
    request = dict(row.request)
    if request.get("lora_request") == ADAPTER:
        request["lora_request"] = _adapter(tmp_path_factory)
    tolerance = SIXTEEN_BITS if row.engine in FOUR_BITS else TOLERANCE
    prompt = rig.prompt(200, 100, total=620)
    expected = _ask(rig, prompt, row, request, blend=False)
    found = _ask(rig, prompt, row, request, selector="everything")
    _expect_equal(found, expected, tolerance)
    assert found.report.on_blended_kv == (row.reason is BLENDED)
    if "n" not in row.sampling:  # of several answers one is blended, and the last may have found its KV
        assert found.report.reason == row.reason
    if row.reason is BLENDED:
        if "n" not in row.sampling:
            assert found.report.recomputed_tokens == 300
        # With nothing recomputed another answer comes: the stored KV was used, and could have made a difference.
        reused = _ask(rig, prompt, row, request, selector="none")
        assert reused.report.on_blended_kv
        assert not _equal(reused, expected, tolerance)
    _expect_equal(_ask(rig, prompt, row, request, blend=False, keep=True), expected, tolerance)


@pytest.mark.full
@pytest.mark.parametrize("rig", [ADAPTERS], indirect=True)
def test_adapters_and_blends_in_the_same_steps(rig, tmp_path_factory):
    """A blend's own forward runs between the steps of requests with an adapter, and neither sees the other."""
    from vllm import SamplingParams

    adapter = _adapter(tmp_path_factory)
    sampling = SamplingParams(max_tokens=24, temperature=0.0, logprobs=1, ignore_eos=True)
    prompts = [rig.prompt(200, 100, total=620, seed=seed) for seed in range(6)]
    alone = [
        _ask(rig, p, Row(ADAPTERS), {"lora_request": adapter} if i % 2 else {}, 24, blend=False)
        for i, p in enumerate(prompts)
    ]
    rig.reset()

    async def one(prompt, request):
        options = {"selector": "everything"}
        async for output in rig.engine.generate([int(t) for t in prompt], sampling, options=options, **request):
            final = output
        return final

    async def together():
        import asyncio

        return await asyncio.gather(
            *(one(prompt, {"lora_request": adapter} if index % 2 else {}) for index, prompt in enumerate(prompts))
        )

    outputs = rig.engine.run(together())
    assert [output.report.blended for output in outputs] == [True, False] * 3
    for output, expected in zip(outputs, alone, strict=True):
        _expect_equal(output, expected)
    assert not _equal(alone[1], _ask(rig, prompts[1], Row(ADAPTERS), {}, 24, blend=False))  # the adapter does something


def _ask(rig, prompt, row, request, count=16, keep=False, **options):
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    sampling = {"temperature": 0.0, "logprobs": 1, "ignore_eos": True, "max_tokens": count, **row.sampling}
    if "structured_outputs" in sampling:
        sampling["structured_outputs"] = StructuredOutputsParams(**sampling["structured_outputs"])
        sampling["ignore_eos"] = False
    if not keep:
        rig.reset()
    (output,) = rig.llm.generate(
        [[int(token) for token in prompt]], SamplingParams(**sampling), blend=options, **request
    )
    return output


def _equal(one, other, tolerance=TOLERANCE):
    """Whether all answers have the same tokens and log-probabilities."""
    return all(
        a.token_ids == b.token_ids
        and np.allclose(
            [step[token].logprob for token, step in zip(a.token_ids, a.logprobs, strict=True)],
            [step[token].logprob for token, step in zip(b.token_ids, b.logprobs, strict=True)],
            rtol=0,
            atol=tolerance,
        )
        for a, b in zip(one.outputs, other.outputs, strict=True)
    )


def _expect_equal(one, other, tolerance=TOLERANCE):
    assert [answer.token_ids for answer in one.outputs] == [answer.token_ids for answer in other.outputs]
    assert _equal(one, other, tolerance)


def _adapter(tmp_path_factory):
    """A LoRA adapter of the tiny Llama that changes its answers."""
    import torch
    from safetensors.torch import save_file
    from vllm.lora.request import LoRARequest

    folder = tmp_path_factory.getbasetemp() / "adapter"
    if not folder.exists():
        folder.mkdir()
        generator = torch.Generator().manual_seed(1)
        sizes = {"q_proj": (128, 128), "k_proj": (128, 64), "v_proj": (128, 64)}
        tensors = {}
        for layer in range(4):
            for name, (inputs, outputs) in sizes.items():
                at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
                tensors[f"{at}.lora_A.weight"] = torch.randn(8, inputs, generator=generator) * 0.1
                tensors[f"{at}.lora_B.weight"] = torch.randn(outputs, 8, generator=generator) * 0.1
        save_file(tensors, folder / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": sorted(sizes), "bias": "none"}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    return LoRARequest("adapter", 1, str(folder))
