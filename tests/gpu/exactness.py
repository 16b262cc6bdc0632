"""On a GPU: everything recomputed against plain vLLM, bfloat16, for random models of several families.

    python tests/gpu/exactness.py OUT.json [family …] [--eager] [--ranks N]

Prints, by family and prompt length, the largest difference of 16 greedy tokens' log-probabilities: of
blending with everything recomputed, and, as the measure of what bfloat16 allows, of plain vLLM with another
batch shape (half of the prompt in the prefix cache). With ``--ranks`` the model is split over N GPUs (tensor
parallelism). A script, since CI has no GPU.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

LENGTHS = (300, 1500, 5000)


def build(family: str, folder: Path) -> Path:
    """Random weights of the real architecture class, strong enough for attention to matter."""
    import torch
    import transformers

    common = {
        "vocab_size": 32000,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 16384,
    }
    config = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config", "mistral": "MistralConfig"}[
        family
    ]
    extra = {"sliding_window": None} if family == "mistral" else {}
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**common, **extra))
    for parameter in made.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(2.5)
    made.to(torch.bfloat16).save_pretrained(folder / family)
    return folder / family


def measure(family: str, eager: bool, ranks: int, folder: Path) -> dict:
    """Differences of one family."""
    from kvblend_rag import LLM, BlendConfig, SamplingParams

    rng = np.random.default_rng(0)
    config = BlendConfig(
        store_path=str(folder / f"store-{family}"),
        ingest_context="none",
        chunk_size=512,
        max_device_gb=1,
        planner=False,
    )
    greedy = SamplingParams(max_tokens=16, temperature=0, logprobs=5, ignore_eos=True, detokenize=False)
    found: dict = {"differences": {}}
    with LLM(
        build(family, folder),
        config=config,
        enforce_eager=eager,
        skip_tokenizer_init=True,
        max_model_len=8192,
        max_num_batched_tokens=2048,
        gpu_memory_utilization=0.15,
        tensor_parallel_size=ranks,
    ) as llm:
        engine = llm.kvblend.engine
        found["refusal"] = engine.info.refusal
        if found["refusal"]:
            return found
        chunks = [rng.integers(100, 30000, 400).astype(np.int32) for _ in range(12)]
        llm.kvblend.ingest(chunks, progress=False)
        for length in LENGTHS:
            count = (length - 60) // 400 or 1
            parts = [chunks[i][: length - 60] for i in rng.permutation(12)[:count]]
            body = np.concatenate([rng.integers(100, 30000, 30), *parts])
            prompt = np.concatenate([body, rng.integers(100, 30000, max(length - len(body), 20))]).astype(np.int32)

            def ask(_prompt=prompt, **blend):
                engine.run(engine.reset_prefix_cache())
                return llm.generate(_prompt, greedy, blend=blend)[0]

            plain = ask(blend=False)
            engine.run(engine.reset_prefix_cache())
            llm.generate(prompt[: length // 2], greedy, blend={"blend": False})
            other = llm.generate(prompt, greedy, blend={"blend": False})[0]
            exact = ask(selector="everything", ratio=1.0)
            reused = ask(selector="none")
            picked = {name: ask(selector=name, ratio=0.15) for name in ("first", "deviation", "question")}
            assert exact.report.recomputed_tokens > 0, exact.report
            # The same stored KV out of the device's memory, and out of both at once, must give the same answer.
            fresh = rng.integers(100, 30000, 200).astype(np.int32)
            llm.kvblend.ingest([fresh], progress=False)
            longer = np.concatenate([prompt[:20], fresh, prompt[20:]]).astype(np.int32)
            hot = ask(selector="none")
            mixed = ask(longer, selector="none")
            ask(longer, selector="none")
            all_hot = ask(longer, selector="none")
            tiers = [sorted({chunk.tier for chunk in each.report.chunks}) for each in (hot, mixed, all_hot)]
            assert tiers == [["device"], ["device", "memory"], ["device"]], tiers
            found["differences"][length] = {
                "everything recomputed": difference(exact, plain),
                "plain, another batch shape": difference(other, plain),
                "nothing recomputed": difference(reused, plain),
                "out of device memory": difference(hot, reused),
                "out of both": difference(all_hot, mixed),
                **{f"{name} 15 %": difference(output, plain) for name, output in picked.items()},
            }
    return found


def difference(output, plain) -> float:
    """Largest difference of log-probabilities, up to where the greedy texts part."""
    worst = 0.0
    a, b = output.outputs[0], plain.outputs[0]
    for mine, theirs, x, y in zip(a.token_ids, b.token_ids, a.logprobs, b.logprobs, strict=True):
        common = x.keys() & y.keys()
        worst = max([worst, *(abs(x[t].logprob - y[t].logprob) for t in common)])
        if mine != theirs:
            break
    return worst


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("families", nargs="*", default=["llama", "qwen3"])
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--ranks", type=int, default=1)
    given = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for family in given.families:
            results[family] = measure(family, given.eager, given.ranks, Path(folder))
            print(family, json.dumps(results[family], indent=1), flush=True)
    given.out.write_text(json.dumps({"eager": given.eager, "ranks": given.ranks, "families": results}, indent=1))


if __name__ == "__main__":
    main()
