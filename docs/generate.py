"""Tables of the README and the docs that are made from code and from result files, never by hand.

``python docs/generate.py`` rewrites the marked blocks of README.md; a test checks that they are up to date.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
RESULTS = DOCS / "results"

# KV heads, head dimension, layers: as in the models' published config.json.
MODELS = {
    "Qwen2.5-0.5B": (2, 64, 24),
    "SmolLM2-135M (the bundled reader)": (3, 64, 30),
    "Llama-3.2-3B": (8, 128, 28),
    "Qwen2.5-7B": (4, 128, 28),
    "Mistral-7B-v0.3": (8, 128, 32),
    "Llama-3.1-8B": (8, 128, 32),
    "Qwen3-8B": (8, 128, 36),
    "Llama-3.1-70B": (8, 128, 80),
}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others stand to the right unless they hold sentences."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _field_docs() -> dict[str, str]:
    """The sentence under each field of BlendConfig, read from the source."""
    tree = ast.parse((ROOT / "kvblend_rag" / "config.py").read_text(encoding="utf-8"))
    (config,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "BlendConfig")
    documented = {}
    for node, after in zip(config.body, config.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(after, ast.Expr):
            documented[node.target.id] = " ".join(ast.literal_eval(after.value).replace("``", "`").split())
    return documented


def configuration() -> str:
    """Every setting, its default and what it does."""
    from kvblend_rag.config import BlendConfig

    documented = _field_docs()
    rows = []
    for field in dataclasses.fields(BlendConfig):
        default = field.default
        if field.name == "store_path":
            shown = "`~/.cache/kvblend/store`"
        elif default is dataclasses.MISSING:
            shown = "`{}`"
        else:
            shown = f"`{json.dumps(default)}`"
        rows.append([f"`{field.name}`", shown, documented[field.name]])
    return table(["setting", "default", "meaning"], rows)


def capacity() -> str:
    """KV bytes per token and chunk of models whose shape is known."""
    rows = []
    for name, (heads, dim, layers) in sorted(MODELS.items(), key=lambda item: item[1][0] * item[1][1] * item[1][2]):
        token = 2 * layers * heads * dim * 2
        rows.append(
            [
                name,
                f"{layers} × 2 × {heads} × {dim}",
                f"{token / 1024:g} KiB",
                f"{256 * token / 2**20:g} MiB",
                f"{10**6 * token / 2**30:,.1f} GiB",
                f"{50 * 2**30 // (256 * token):,}",
            ]
        )
    head = ["model", "layers × K and V × KV heads × head dim", "a token", "a chunk of 256", "a million tokens"]
    return table([*head, "such chunks in 50 GiB"], rows)


def _loaded() -> list[tuple[str, dict[str, Any]]]:
    files = sorted(RESULTS.glob("*.json")) if RESULTS.is_dir() else []
    loaded = []
    for file in files:
        value = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            loaded.append((file.name, value))
    return loaded


def is_ttft(result: dict[str, Any]) -> bool:
    """Whether a result file is one of `kvblend bench ttft`."""
    rows = result.get("rows")
    return isinstance(rows, list) and bool(rows) and isinstance(rows[0], dict) and "speedup" in rows[0]


def _facts(result: dict[str, Any]) -> str:
    parts = []
    for name in ("engine", "machine"):
        facts = result.get(name)
        if isinstance(facts, dict):
            parts += [f"{key} {_plain(value)}" for key, value in facts.items() if isinstance(value, (str, int, float))]
            for value in facts.values():
                if isinstance(value, dict):
                    parts += [f"{key} {_plain(each)}" for key, each in value.items() if isinstance(each, (str, int))]
    return "; ".join(parts)


def _plain(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"(/[\w.+-]+){2,}/", "…/", text)


def _ttft_rows(result: dict[str, Any]) -> str:
    rows = [
        [
            str(row["name"]),
            f"{row['prompt_tokens']:,.0f}",
            f"{row['reused_tokens']:,.0f}",
            f"{row['recomputed_tokens']:,.0f}",
            f"{row['computed_tokens']:,.0f}",
            f"{row['seconds']['median']:.3f} ({row['seconds']['min']:.3f} to {row['seconds']['max']:.3f})",
            f"{row['speedup']['median']:.2f}",
        ]
        for row in result["rows"]
    ]
    return table(
        ["", "prompt", "reused", "recomputed", "computed", "TTFT, s: median (min to max)", "plain / this"], rows
    )


def is_gpu(result: dict[str, Any]) -> bool:
    """Whether a result file is one of `tests/gpu/ttft.py`: by prompt length and arm."""
    arms = next(iter(result.get("results", {}).values()), None) if isinstance(result.get("results"), dict) else None
    return isinstance(arms, dict) and "median_ms" in arms.get("plain", {})


def _gpu_rows(result: dict[str, Any]) -> str:
    rows = [
        [
            f"{int(length):,}",
            name,
            *(f"{arm['tokens'][f'{group}_tokens']:,}" for group in ("cached", "reused", "recomputed", "computed")),
            f"{arm['median_ms']:,.0f} ({arm['min_ms']:,.0f} to {arm['max_ms']:,.0f})",
            f"{arm['speedup']:.2f}",
        ]
        for length, arms in result["results"].items()
        for name, arm in arms.items()
    ]
    groups = ["cached", "reused", "recomputed", "computed"]
    return table(["prompt", "", *groups, "TTFT, ms: median (min to max)", "plain / this"], rows)


_GPU_ARMS = ("plain", "question 10 %, spans of 64", "first 10 %, spans of 64", "reuse only", "prefix hit")


def _gpu_summary(results: list[dict[str, Any]]) -> str:
    """A line a shape and length; the ratio to plain in brackets."""
    rows = []
    for result in results:
        for length, arms in result["results"].items():
            cells = [
                f"{arms[name]['median_ms']:,.0f}" + ("" if name == "plain" else f" ({arms[name]['speedup']:.1f}×)")
                for name in _GPU_ARMS
                if name in arms
            ]
            rows.append([str(result["shape"]), f"{int(length):,}", *cells])
    return table(["shape", "prompt", *(f"{name}, ms" for name in _GPU_ARMS)], rows)


def _flat(value: Any, prefix: str = "") -> list[list[str]]:
    """Numbers and short texts of a result of an unknown kind, by their path."""
    rows: list[list[str]] = []
    if isinstance(value, dict):
        for key, each in value.items():
            rows += _flat(each, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, (int, float, str, bool)) and len(str(value)) < 80:
        rows.append([f"`{prefix}`", _plain(value)])
    return rows


def results() -> str:
    """Every result file as a section: what was run, on what, and what came out."""
    loaded = _loaded()
    if not loaded:
        return "There are no result files in `docs/results/` yet.\n"
    parts = []
    for name, result in loaded:
        command = result.get("command")
        parts.append(f"## {name.removesuffix('.json')}\n")
        if command:
            parts.append(f"```console\n$ {_plain(command)}\n```\n")
        if facts := _facts(result):
            parts.append(f"{facts}\n")
        if is_ttft(result):
            parts.append(_ttft_rows(result))
        elif is_gpu(result):
            parts.append("Random weights in the model's shape: speed only.\n")
            parts.append(_gpu_rows(result))
        else:
            skipped = ("machine", "engine", "command")
            rest = _flat({key: value for key, value in result.items() if key not in skipped})
            parts.append(table(["", ""], rest[:40]) if rest else "See the file.\n")
    return "\n".join(parts)


def headline() -> str:
    """The README's figures: measured times to first token, with their commands."""
    loaded = _loaded()
    parts = []
    for name, result in loaded:
        if is_ttft(result):
            parts.append(f"From `docs/results/{name}` (`{_plain(result.get('command', 'no command recorded'))}`):\n")
            parts.append(_ttft_rows(result))
    if not parts:
        parts.append("CPU: no result file yet (`docs/results/*.json`).\n")
    gpu = [(name, result) for name, result in loaded if is_gpu(result)]
    if gpu:
        first = gpu[0][1]
        machine = first["machine"]["gpu"]
        parts.append(
            f"{machine}, {first['engine']}, {first['dtype']}, random weights in the shapes of known models "
            "(speed only); median TTFT, and in brackets how many times sooner than plain. "
            "A prefix hit is what no method beats.\n"
        )
        parts.append(_gpu_summary([result for _, result in gpu]))
        commands = "; ".join(f"`{_plain(result['command'])}`" for _, result in gpu)
        parts.append(f"Again with: {commands}. All arms: `docs/results/gpu-ttft-*.json`.\n")
    else:
        parts.append("GPU: no result file yet (`docs/results/gpu-*.json`).\n")
    return "\n".join(parts)


BLOCKS = {"configuration": configuration, "results": headline}


def with_blocks(text: str) -> str:
    """A Markdown text with its marked blocks made anew."""
    for name, make in BLOCKS.items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        if begin in text:
            before, _, rest = text.partition(begin)
            text = f"{before}{begin}{make()}{end}{rest.partition(end)[2]}"
    return text


def main() -> None:
    """Rewrite the marked blocks of README.md."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    new = with_blocks(text)
    if new != text:
        readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
