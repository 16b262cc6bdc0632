"""Throughput as vLLM's own benchmark sees it: `vllm serve` as it ships, then `kvblend serve`, on the same machine.

    python tests/gpu/serving.py OUT.json [--shape NAME] [--chunk-tokens N] [--per-prompt N] [--population N]
        [--seconds S] [--factors F …] [--selectors NAME …] [--serve-option=OPTION …]

Prompts of chunks that are drawn by Zipf's law, and a new question each, arrive at random (Poisson) at both servers,
over HTTP, from `vllm bench serve`. Plain vLLM is asked at a rate that it sustains, which gives a 95th percentile of
TTFT; then blended requests at rising multiples of that rate, until they are above it. The prefix cache is on, and
emptied before each run. Random weights; a tokenizer whose tokens are words. OUT.json is written anew after each run.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from kvblend_rag import KVBlend
from kvblend_rag.blend.chunk import TokenIds
from kvblend_rag.commands.bench_load import Traffic
from kvblend_rag.commands.machine import machine
from kvblend_rag.commands.server_process import ServerProcess, running
from kvblend_rag.commands.shapes import SHAPES, write_shape
from kvblend_rag.commands.word_tokenizer import word, write_word_tokenizer
from kvblend_rag.config import BlendConfig

ANSWER_TOKENS = 16
UTILISATION = 0.7
"""Share of plain vLLM's capacity, one prompt after the other, at which its latency is taken."""

SELECTORS = ("first", "question")
BENCHMARK = (
    "import argparse; from vllm.benchmarks.serve import add_cli_args, main; "
    "parser = argparse.ArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)


def texts(ids: Iterable[TokenIds]) -> list[str]:
    """As the model's tokenizer reads them."""
    return [" ".join(map(word, tokens.tolist())) for tokens in ids]


class Server:
    """One of both servers, and vLLM's benchmark against it."""

    def __init__(self, process: ServerProcess, model: Path) -> None:
        self._process, self._model = process, model

    def ingest(self, chunks: list[TokenIds]) -> None:
        """Have the chunks stored; for one of ours alone."""
        with KVBlend(BlendConfig(base_url=f"{self._process.url}/v1")) as kv:
            kv.ingest(chunks, progress=False)

    def outcomes(self) -> dict[str, float]:
        """Requests so far by what became of them."""
        with urllib.request.urlopen(f"{self._process.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        found = [line for line in lines if line.startswith("vllm:kvblend_requests_total{")]
        return {line.partition('outcome="')[2].partition('"')[0]: float(line.rpartition(" ")[2]) for line in found}

    def measure(self, prompts: list[str], rate: float, extra: dict | None, folder: Path) -> dict:
        """One run of vLLM's benchmark."""
        self._process.reset_prefix_cache()
        before = self.outcomes()
        rows, result = folder / "prompts.jsonl", folder / "result.json"
        rows.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in prompts))
        command = [sys.executable, "-c", BENCHMARK, "--base-url", self._process.url, "--model", str(self._model)]
        command += ["--dataset-name", "custom", "--dataset-path", str(rows), "--num-prompts", str(len(prompts))]
        command += ["--custom-output-len", str(ANSWER_TOKENS), "--ignore-eos", "--request-rate", str(rate)]
        command += ["--skip-chat-template", "--disable-shuffle"]
        command += ["--metric-percentiles", "50,95,99", "--percentile-metrics", "ttft,itl"]
        command += ["--save-result", "--result-filename", str(result), "--disable-tqdm"]
        command += ["--extra-body", json.dumps(extra)] if extra else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = json.loads(result.read_text()) if done.returncode == 0 else {"completed": 0}
        if found["completed"] < len(prompts):
            said = f"{done.stderr[-4000:]}\n{self._process.log.read_text()[-4000:]}"
            raise SystemExit(f"Of {len(prompts)} requests {found['completed']} were answered:\n{said}")
        after = self.outcomes()
        return {
            "rate": rate,
            "requests": len(prompts),
            "completed": found["completed"],
            "input_tokens": found["total_input_tokens"],
            "served_per_second": found["request_throughput"],
            "ttft_ms": {f"p{share}": found[f"p{share}_ttft_ms"] for share in (50, 95, 99)},
            "itl_ms": {"mean": found["mean_itl_ms"], "p99": found["p99_itl_ms"]},
            "outcomes": {name: after[name] - before.get(name, 0) for name in after},
        }


@contextlib.contextmanager
def serving(model: Path, folder: Path, module: str, *arguments: object) -> Iterator[Server]:
    """A server out of a module, until the block ends; ``folder`` takes its log."""
    folder.mkdir()
    command = [sys.executable, "-m", module, *map(str, arguments)]
    # the route that empties the prefix cache is one for developers
    with running(command, folder, VLLM_SERVER_DEV_MODE="1") as process:
        yield Server(process, model)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--chunk-tokens", type=int, default=1000)
    parser.add_argument("--per-prompt", type=int, default=8)
    parser.add_argument("--population", type=int, default=128, help="chunks that prompts are drawn from")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long prompts arrive in a run")
    parser.add_argument("--factors", type=float, nargs="+", default=[3, 4, 5, 6, 7, 8])
    parser.add_argument("--selectors", nargs="+", default=SELECTORS, choices=SELECTORS)
    parser.add_argument("--serve-option", action="append", default=[], help="of both servers, as in --serve-option=X")
    given = parser.parse_args()
    arms = {f"{name} 10 %": {"selector": name, "ratio": 0.1} for name in given.selectors}
    rng, words = np.random.default_rng(0), SHAPES[given.shape]["vocab_size"]
    chunks = [rng.integers(100, words, given.chunk_tokens).astype(np.int32) for _ in range(given.population)]

    def prompts(count: int, seed: int) -> list[TokenIds]:
        """The same for the same seed."""
        traffic = Traffic(chunks, given.per_prompt, words, rng=np.random.default_rng(seed))
        return [traffic.prompt() for _ in range(count)]

    length = len(prompts(1, 0)[0])
    options = ["--load-format", "dummy", "--max-model-len", str(length + 2 * ANSWER_TOKENS), *given.serve_option]
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "shape": given.shape,
        "settings": {
            "chunks": given.population,
            "chunks_per_prompt": given.per_prompt,
            "prompt_tokens": length,
            "answer_tokens": ANSWER_TOKENS,
            "seconds": given.seconds,
            "arms": arms,
        },
        "machine": machine(),
        "rows": [],
    }

    def keep(arm: str, row: dict) -> dict:
        result["rows"].append({"arm": arm, **row})
        given.out.write_text(json.dumps(result, indent=1))
        print(arm, row, flush=True)
        return row

    with tempfile.TemporaryDirectory(prefix="kvblend-serving-") as name:
        folder = Path(name)
        model = write_shape(given.shape, folder / given.shape)
        write_word_tokenizer(model, words)

        def measure(server: Server, rate: float, blend: dict | None = None, seed: int = 1) -> dict:
            asked = texts(prompts(max(8, round(rate * given.seconds)), seed))
            extra = {"kv_transfer_params": {"kvblend": blend}} if blend else None
            return server.measure(asked, rate, extra, folder)

        with serving(
            model, folder / "plain", "vllm.entrypoints.openai.api_server", "--model", model, *options
        ) as plain:
            for seed in (2, 0):  # the first compiles
                alone = plain.measure(texts(prompts(6, seed)), 0.5, None, folder)
            rate = UTILISATION * 1e3 / alone["ttft_ms"]["p50"]
            bound = keep("plain", measure(plain, rate))["ttft_ms"]["p95"]
        ours = ["serve", "--store", folder / "store", "--set", "ingest_context=none", "--set", "chunk_size=65536"]
        ours += ["--set", "max_memory_gb=64", model]
        with serving(model, folder / "blending", "kvblend_rag.cli", *ours, *options) as blending:
            keep("kvblend serve, blending off", measure(blending, rate, {"blend": False}))
            blending.ingest(chunks)
            for arm, blend in arms.items():
                measure(blending, rate, blend, seed=0)  # warms up
                for factor in given.factors:
                    row = keep(arm, {"factor": factor, **measure(blending, rate * factor, blend)})
                    if row["ttft_ms"]["p95"] > bound:
                        break


if __name__ == "__main__":
    main()
