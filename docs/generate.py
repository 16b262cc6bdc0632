"""Tables of the README and the docs that are made from code and from result files, never by hand.

``python docs/generate.py`` rewrites the marked blocks of README.md and of the page on answer quality; a test
checks that they are up to date.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvblend_rag.quality.markdown import cell, summary_table
from kvblend_rag.quality.summary import ALL, MADE_SETS, REAL, TWO_CHUNKS

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
RESULTS = DOCS / "results"


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
    from kvblend_rag.commands.capacity import MODELS

    rows = []
    for name, shape in sorted(MODELS.items(), key=lambda item: item[1].bytes_per_token()):
        token = shape.bytes_per_token()
        rows.append(
            [
                name,
                f"{shape.layers} × 2 × {shape.kv_heads} × {shape.head_dim}",
                f"{token / 1024:g} KiB",
                f"{256 * token / 2**20:g} MiB",
                f"{10**6 * token / 2**30:,.1f} GiB",
                f"{50 * 2**30 // (256 * token):,}",
            ]
        )
    head = ["model", "layers × K and V × KV heads × head dim", "a token", "a chunk of 256", "a million tokens"]
    return table([*head, "such chunks in 50 GiB"], rows)


def capacity_tiers() -> str:
    """What `kvblend plan-capacity` says by tier for every model, with its own round figures."""
    from kvblend_rag.commands.capacity import MODELS, TERAFLOPS, TIERS, Plan

    rows = []
    for name, shape in sorted(MODELS.items(), key=lambda item: item[1].bytes_per_token()):
        plan = Plan(shape, shape.prefill_rate(TERAFLOPS))
        tiers = [plan.tier(tier) for tier in TIERS.values()]
        costs = (f"{tier['dollars_a_million']:,.2f}" for tier in tiers)
        rows.append([name, f"{plan.prefill_rate:,.0f}", f"{plan.break_even():,.2f}", *costs])
    return table(["model", "prefill, tokens/s", "break-even, GB/s", *(f"{name}, $" for name in TIERS)], rows)


def encodings() -> str:
    """Size and error of each encoding, as `kvblend bench encodings` measured them."""
    result = json.loads((RESULTS / "encodings.json").read_text(encoding="utf-8"))
    rows = [
        [
            f"`{name}`",
            f"{row['bytes_per_token']:,.0f}",
            f"{row['times_smaller']:.2f}×",
            *(f"{row[part]['median']:.4f} ({row[part]['max']:.4f})" for part in ("keys", "values")),
            *_encoding_quality(name),
        ]
        for name, row in result["rows"].items()
    ]
    settings = result["settings"]
    head = ["`encoding`", "bytes a token", "smaller", "error of keys: median (worst chunk)", "of values"]
    head += ["KL of reuse, as a share of unencoded", "of `question`, 15 %"]
    measured = (
        f"{settings['chunks']} chunks of {settings['tokens']:,} tokens in all, {settings['dtype']}, of the bundled"
    )
    origin = f"reader; `{_plain(result['command'])}` on the store that `kvblend demo` leaves."
    return f"{table(head, rows)}\n{measured} {origin}\n"


def _encoding_quality(name: str) -> list[str]:
    """What an encoding does to answers: KL to the full prefill as a share of the KL with chunks as computed."""
    file = RESULTS / f"encoding-quality-{name}.json"
    if not file.exists():
        return ["1", "1"] if name == "none" else ["", ""]
    arms = json.loads(file.read_text(encoding="utf-8"))["comparison"]["all"]["arms"]
    return [cell(arms[arm]["kl_ratio"], "{:.2f}") for arm in ("reuse", "question:0.15")]


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
    return re.sub(r"(?<![\w.])(/[\w.+-]+){2,}/", "…/", text)


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


def is_planner(result: dict[str, Any]) -> bool:
    """Whether a result file is one of `kvblend bench planner`."""
    return "worst_ratio" in result


def _planner_rows(result: dict[str, Any]) -> str:
    rows = []
    for row in result["rows"]:
        ratio = row["ratio"]
        _, low, high = ratio["planned"]["mean"]
        rows.append(
            [
                row["case"],
                f"{row['prompt_tokens']:,}",
                f"{row['seconds']['plain']['median'] * 1e3:,.0f}",
                f"{ratio['planned']['median']:.3f}",
                f"{low:.3f} to {high:.3f}",
                f"{ratio['loaded']['median']:.2f}",
                f"{row['blended']:.0%}",
            ]
        )
    head = ["case", "prompt", "plain, ms", "planned / plain, median", "its mean, 95 %", "loaded / plain", "blended"]
    return table(head, rows)


def planner(machine: str) -> str:
    """The sweep on two cores or on a GPU, as `kvblend bench planner` measured it."""
    name = {"cpu": "cpu-planner.json", "gpu": "gpu-planner-h200.json"}[machine]
    result = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return f"{_planner_rows(result)}\nFrom `docs/results/{name}` (`{_plain(result['command'])}`).\n"


def is_gpu(result: dict[str, Any]) -> bool:
    """Whether a result file is one of `tests/gpu/ttft.py`: by prompt length and arm."""
    arms = next(iter(result.get("results", {}).values()), None) if isinstance(result.get("results"), dict) else None
    return isinstance(arms, dict) and "median_ms" in arms.get("plain", {})


def _gpu_rows(measured: dict[str, Any]) -> str:
    rows = [
        [
            f"{int(length):,}",
            name,
            *(f"{arm['tokens'][f'{group}_tokens']:,}" for group in ("cached", "reused", "recomputed", "computed")),
            f"{arm['median_ms']:,.0f} ({arm['min_ms']:,.0f} to {arm['max_ms']:,.0f})",
            f"{arm['speedup']:.2f}",
        ]
        for length, arms in measured.items()
        for name, arm in arms.items()
    ]
    groups = ["cached", "reused", "recomputed", "computed"]
    return table(["prompt", "", *groups, "TTFT, ms: median (min to max)", "plain / this"], rows)


def _gpu_more(result: dict[str, Any]) -> str:
    """Ingest and, where it was measured, what happens under load."""
    parts = []
    if "prefill_tokens_per_second" in result:
        ingest, prefill = result["ingest_tokens_per_second"], result["prefill_tokens_per_second"]
        disk, first = result.get("disk_bytes_per_second"), result.get("first_ingest_tokens_per_second")
        parts.append(
            f"Ingest until all is durable: {ingest:,.0f} tokens a second, {ingest / prefill:.2f} of vLLM's own prefill "
            f"of as many chunks ({prefill:,.0f})."
            + (f" Into memory that is page-locked for it, {first:,.0f} ({first / prefill:.2f})." if first else "")
            + (f" The store's device takes {disk / 1e9:.1f} GB/s.\n" if disk else "\n")
        )
    if result.get("hot"):
        parts.append(f"A second engine, its chunks in {result['device_gb']:g} GiB of the GPU's own memory:\n")
        parts.append(_gpu_rows(result["hot"]))
    if result.get("sweep"):
        parts.append("Budgets:\n")
        parts.append(_gpu_rows(result["sweep"]))
    if result.get("load"):
        parts.append(_load(result["load"]))
    return "\n".join(parts)


def _load(load: dict[str, Any]) -> str:
    """What happens under load, as `kvblend bench load` and `bench gpu --load` measure it."""
    settings = load["settings"]
    rates = [
        [row["arm"], f"{row['rate']:.1f}", *(f"{value:,.0f}" for value in row["ttft_ms"].values())]
        for row in load["rows"]
    ]
    return "\n".join(
        [
            f"Under load: {settings['chunks_per_prompt']} of {settings['chunks']} chunks a prompt by Zipf's law, "
            f"{settings['prompt_tokens']:,} tokens, Poisson arrivals for {settings['seconds']:g} s a row. Blended "
            f"requests keep plain ones' 95th percentile at {load['rate_at_plain_p95']:g} times the rate.\n",
            table(["", "arrivals a second", "TTFT, ms: p50", "p95", "p99"], rates),
            "Milliseconds between the tokens of 16 running answers while such prompts arrive:\n",
            _between_tokens(load),
        ]
    )


def _between_tokens(load: dict[str, Any]) -> str:
    columns = ("mean", "p50", "p95", "p99", "max")
    found = load["inter_token_ms"].items()
    return table(["arriving", *columns], [[name, *(f"{each[at]:.1f}" for at in columns)] for name, each in found])


def cpu_load() -> str:
    """Milliseconds between the tokens of running answers on a CPU, by what arrives."""
    result = json.loads((RESULTS / "cpu-load.json").read_text(encoding="utf-8"))
    return f"{_between_tokens(result['load'])}\nFrom `docs/results/cpu-load.json` (`{_plain(result['command'])}`).\n"


_GOAL_ARM = "first 10 %, spans of 16"


def gpu_goals() -> str:
    """What was to be reached in the shape of Llama-3.1-8B, and what was, on an H100 and an H200; what is, in bold."""
    loaded = dict(_loaded())
    rows: dict[str, list[str]] = {}
    cards = {"H100": "", "H200": "-h200"}
    memory = loaded["gpu-ingest-memory.json"]
    for column, suffix in enumerate(cards.values()):
        speed = loaded[f"gpu-ttft-llama-3.1-8b{suffix}.json"]
        load = loaded[f"gpu-load-llama-3.1-8b{suffix}.json"]["load"]
        same = memory["machine"]["gpu"] == speed["machine"]["gpu"]
        for what, wanted, measured in (*_speed_goals(speed, memory if same else None), *_load_goals(load)):
            row = rows.setdefault(what, [what, f"{'≥' if wanted > 0 else '≤'} {abs(wanted):g}", *("" for _ in cards)])
            if measured is None:
                continue
            reached = measured >= wanted if wanted > 0 else measured <= -wanted
            row[2 + column] = f"**{measured:.2f}**" if reached else f"{measured:.2f}"
    return table(["", "to reach", *cards], list(rows.values()))


_Goals = list[tuple[str, float, float | None]]


def _load_goals(load: dict[str, Any]) -> _Goals:
    """As ``_speed_goals``, under load."""
    tokens = load["inter_token_ms"]
    goals: _Goals = [("requests a second at plain's 95th percentile", 3, load["rate_at_plain_p95"])]
    for arriving in ("blended", "mixed"):
        for key, name in (("mean", "mean"), ("p95", "95th percentile"), ("p99", "99th percentile")):
            if arriving in tokens:
                what = f"between the tokens of running answers, {arriving} arriving against plain: {name}"
                goals.append((what, -1, tokens[arriving][key] / tokens["plain"][key]))
        if "prompts" in tokens["plain"]:
            idle, both = tokens["idle"]["mean"], (tokens[arriving], tokens["plain"])
            mine, plain = ((found["mean"] - idle) / found["prompts"] for found in both)
            goals.append((f"the same, added to the mean by each prompt: {arriving}", -1, mine / plain))
    return goals


def gpu_question() -> str:
    """How much sooner `question` answers on a GPU where chunks are kept in eight bits."""
    arms = ("reuse only", "first 10 %, spans of 64", "question 10 %, spans of 64")
    rows = [
        [f"`{encoding}`", f"{int(length):,}", *(f"{measured[arm]['speedup']:.1f}" for arm in arms)]
        for encoding, name in (("none", "gpu-ttft-llama-3.1-8b-h200"), ("int8", "gpu-int8-llama-3.1-8b-h200"))
        for length, measured in json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["results"].items()
    ]
    return table(["", "prompt", "TTFT, reuse only: times sooner", "`first` 10 %", "`question` 10 %"], rows)


def gpu_serving() -> str:
    """Both servers as vLLM's benchmark sees them."""
    rows = []
    files = (RESULTS / f"{name}.json" for name in ("gpu-serving-h200", "gpu-serving-question-h200"))
    for row in (row for file in files for row in json.loads(file.read_text(encoding="utf-8"))["rows"]):
        times = [f"{row['ttft_ms'][share]:,.0f}" for share in ("p50", "p95", "p99")]
        factor = f"{row.get('factor', 1):g}"
        rows.append([row["arm"], factor, f"{row['rate']:.1f}", f"{row['served_per_second']:.1f}", *times])
    return table(["", "times the rate", "asked a second", "served a second", "TTFT, ms: p50", "p95", "p99"], rows)


def gpu_encodings() -> str:
    """How long encoded chunks take to load on a GPU, alone and in a request."""
    found = json.loads((RESULTS / "gpu-encodings.json").read_text(encoding="utf-8"))
    rows = []
    for name, engine in found["encodings"].items():
        for length, arms in engine["results"].items():
            loads = found["loads"][length]
            rows.append(
                [
                    f"`{name}`",
                    f"{engine['memory_bytes_per_token'] / 1024:.1f}",
                    *(f"{loads[f'{name}, {where}']['median_ms']:.0f}" for where in ("staged", "hot")),
                    *(f"{arms[arm]['speedup']:.1f}" for arm in ("reuse only", "first 10 %, spans of 64")),
                ]
            )
    return table(
        ["", "KiB a token", "load, ms", "out of GPU memory, ms", "TTFT, reuse only: times sooner", "`first` 10 %"], rows
    )


def _speed_goals(speed: dict[str, Any], memory: dict[str, Any] | None) -> _Goals:
    """What, to reach (negative: at most), measured; the last is another run's, with its store in memory."""
    from kvblend_rag.commands.bench_gpu import NOTHING
    from kvblend_rag.commands.bench_gpu_plot import floor_ms

    short, long, hot = speed["results"]["8192"], speed["results"]["32768"], speed["hot"]["32768"]
    spans = [_GOAL_ARM.replace("16", size) for size in ("16", "64")]
    wider = [name.replace("first", "question") for name in spans]

    def times(rows: dict[str, Any], name: str) -> float:
        return float(rows[name]["speedup"])

    def above_floor(rows: dict[str, Any]) -> float:
        return float(rows[_GOAL_ARM]["median_ms"] / floor_ms(speed, rows, _GOAL_ARM))

    def ratio(rows: dict[str, Any], name: str, other: str) -> float:
        return float(rows[name]["median_ms"] / rows[other]["median_ms"])

    def ingest(measured: dict[str, Any]) -> float:
        return float(measured["ingest_tokens_per_second"] / measured["prefill_tokens_per_second"])

    question = wider[0]
    return [
        ("TTFT, 8,192 tokens, `first`: times sooner", 4, times(short, _GOAL_ARM)),
        ("TTFT, 8,192 tokens, `question`", 4, times(short, question)),
        ("TTFT, 32,768 tokens, `first`", 7, times(long, _GOAL_ARM)),
        ("the same, spans of 64", 7, times(long, spans[1])),
        ("TTFT, 32,768 tokens, `question`", 7, times(long, question)),
        ("TTFT, 32,768 tokens, reuse only", 10, times(long, "reuse only")),
        ("TTFT, 32,768 tokens, `first`, chunks in device memory", 8, times(hot, _GOAL_ARM)),
        ("the same, `question`", 8, times(hot, question)),
        ("spans of 16 against 64, 32,768 tokens, `first`", -1.1, ratio(long, *spans)),
        ("the same two, `question`", -1.1, ratio(long, *wider)),
        ("TTFT against the floor, 32,768 tokens, `first`", -1.5, above_floor(long)),
        ("the same, 8,192 tokens", -2, above_floor(short)),
        ("nothing matches, 8,192 tokens: TTFT against plain", -1.02, ratio(short, NOTHING, "plain")),
        ("nothing matches, 32,768 tokens", -1.02, ratio(long, NOTHING, "plain")),
        ("ingest against vLLM's own prefill rate, until all is on the disk", 0.95, ingest(speed)),
        ("the same, the store in a file system in memory", 0.95, None if memory is None else ingest(memory)),
    ]


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
        if is_quality(result):
            continue  # a page of its own
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
            once = all(arm["min_ms"] == arm["max_ms"] for arms in result["results"].values() for arm in arms.values())
            parts.append("Each time to first token was taken once.\n" if once else _gpu_rows(result["results"]))
            parts.append(_gpu_more(result))
        elif is_planner(result):
            parts.append("Random weights: speed only. Loaded: everything that is found, without the planner.\n")
            parts.append(_planner_rows(result))
        elif "load" in result:
            parts.append("Random weights: speed only.\n")
            parts.append(_load(result["load"]))
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
    gpu = [
        (name, result)
        for name, result in loaded
        if is_gpu(result) and name.startswith("gpu-ttft-") and not name.endswith("-h200.json")
    ]
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


def is_quality(result: dict[str, Any]) -> bool:
    """Whether a result file is one of `kvblend eval`."""
    return isinstance(result.get("groups"), dict) and "samples" in result


def quality() -> str:
    """What `kvblend eval` measured: the goals, then each result file's tables."""
    several = [(name.removesuffix(".json"), result) for name, result in _loaded() if is_quality(result)]
    if not several:
        return "There are no result files of `kvblend eval` in `docs/results/` yet.\n"
    parts = []
    for name, result in several:
        settings, groups = result["settings"], result["groups"]
        sets = ", ".join(
            f"{count} of {name}" for name, count in Counter(row["set"] for row in result["samples"]).items()
        )
        parts.append(f"## {name}\n")
        sittings = [each["command"] for each in result.get("sittings", [result])]
        commands = "\n".join(f"$ {_plain(command)}" for command in sittings)
        parts.append(f"```console\n{commands}\n```\n")
        parts.append(f"{result['date']}; {_facts(result)}\n")
        if len(sittings) > 1:
            noise = result["between_sittings"]
            parts.append(
                f"{len(sittings)} sittings, put together by `tools/pool_quality.py`. {noise['questions']} questions "
                "were asked in both; of these the KL of `question:0.15` differed by "
                f"{noise['mean_difference']['question:0.15']['kl']:.3f} between the sittings, in the mean.\n"
            )
        left_out = ", ".join(
            f"{settings[key]} {what}"
            for key, what in (("too_long", "too long for the context"), ("no_time", "left out for want of time"))
            if settings.get(key)
        )
        parts.append(
            f"Questions: {settings['questions']} ({sets}){f'; {left_out}' if left_out else ''}. "
            f"Ingest context `{settings['ingest_context']}`, spans of {settings['span_size']}, if not said otherwise.\n"
        )
        if _drawn(result):
            parts.append(f"![Quality against cost]({RESULTS.name}/{name}.png)\n")
        parts.append(_goals(result))
        parts.append("All questions:\n")
        parts.append(summary_table(groups))
        parts.append("ΔNLL and, in brackets, F1 as a share of plain's, by set and kind:\n")
        parts.append(_by_group(groups))
        parts.append(_adaptive(result))
        if result["ttft"]:
            parts.append("Time to first token, one request at a time: ")
            parts[-1] += ", ".join(
                f"{arm} {each['seconds']['median'] * 1e3:,.0f} ms ({each['speedup']['median']:.2f}×)"
                for arm, each in result["ttft"].items()
            )
            parts[-1] += ".\n"
    return "\n".join(parts)


def _drawn(result: dict[str, Any]) -> bool:
    """Whether there are enough questions for a picture to say something."""
    return bool(result["settings"]["questions"] >= 100)


def _goals(result: dict[str, Any]) -> str:
    """What was to be reached, for the default selector at 15 %, and whether it was."""
    groups, arm = result["groups"], "question:0.15"
    every = groups[ALL]["arms"]
    if arm not in every or all(row["set"] in MADE_SETS for row in result["samples"]):
        return ""
    rows = []

    def goal(what: str, estimate: list[float | None] | None, form: str, reached: Callable[[float], bool]) -> None:
        if estimate is not None and None not in estimate:
            value, *ends = map(reached, estimate)
            said = "reached" if value else "not reached"
            decided = all(end == value for end in ends)
            rows.append([what, cell(estimate, form), said if decided else f"{said} by the estimate; undecided"])

    real = groups.get(REAL) or groups[ALL]
    goal("ΔNLL, real questions, ≤ 0.02", real["arms"][arm]["nll_change"], "{:+.3f}", lambda value: value <= 0.02)
    if TWO_CHUNKS in groups:
        made = groups[TWO_CHUNKS]["arms"][arm]["nll_change"]
        goal("ΔNLL, answers from two chunks, ≤ 0.02", made, "{:+.3f}", lambda value: value <= 0.02)
    for name, how in (("kl_published_share", "as published"), ("kl_share", "behind the same context")):
        what = f"KL as a share of the best published selector's {how}, ≤ 0.35"
        goal(what, every[arm].get(name), "{:.2f}", lambda value: value <= 0.35)
    goal("F1 as a share of plain's, ≥ 98 %", every[arm]["f1_share"], "{:.0%}", lambda value: value >= 0.98)
    for name, group in groups.items():
        if name.startswith("kind: ") and group["questions"] >= 100:
            goal(f"F1 of {name}, ≥ 95 %", group["arms"][arm]["f1_share"], "{:.0%}", lambda value: value >= 0.95)
    return f"`{arm}` against what was to be reached:\n\n" + table(["", "measured (95 % interval)", ""], rows)


def _adaptive(result: dict[str, Any]) -> str:
    """Adaptive budgets against the fixed ones at the same mean share, by set: KL as a share of theirs."""
    groups = {name: each for name, each in result["groups"].items() if name == ALL or name.startswith("set: ")}
    fixed = [arm for arm in result["groups"][ALL]["arms"] if re.fullmatch(r"reuse|question:[\d.]+", arm)]
    rows = []
    for arm, each in result["arms"].items():
        if "coverage" not in each["options"] or len(fixed) < 2:
            continue
        cells = []
        for group in groups.values():
            points = sorted((group["arms"][name]["recomputed"][0], group["arms"][name]["kl"][0]) for name in fixed)
            share, kl = (group["arms"][arm][name][0] for name in ("recomputed", "kl"))
            within = points[0][0] <= share <= points[-1][0]
            there = float(np.interp(share, *zip(*points, strict=True))) if within else 0.0
            cells.append(f"{kl / there:.2f} at {share:.0%}" if there else f"{share:.0%}: beyond the fixed ones")
        rows.append([arm, *cells])
    if not rows:
        return ""
    about = "KL as a share of the fixed budgets', interpolated at the same mean share of recomputed tokens:\n\n"
    return about + table(["", *groups], rows)


def _by_group(groups: dict[str, Any]) -> str:
    arms = [arm for arm, row in groups[ALL]["arms"].items() if row["blended"][0] > 0]
    rows = []
    for name, group in groups.items():
        cells = []
        for arm in arms:
            row = group["arms"][arm]
            share = cell(row["f1_share"], "{:.0%}", interval=False)
            cells.append(f"{row['nll_change'][0]:+.3f}" + (f" ({share})" if share else ""))
        rows.append([name, str(group["questions"]), *cells])
    return table(["", "questions", *arms], rows)


# What a reader looks for; the tests' names stand for the others.
FAMILIES = {
    "llama": "Llama 3.x (llama3 scaling)",
    "llama-one-layer": "Llama, one layer (where everything recomputed is everything)",
    "deepseek-moe": "DeepSeek MoE (experts without MLA)",
    "llama-gptq": "Llama, weights in four bits (GPTQ)",
    "llama-awq": "Llama, weights in four bits (AWQ)",
    "llama-int8": "Llama, weights in eight bits (compressed-tensors)",
    "llama2": "Llama 2 (every head its own keys)",
    "llama-linear": "Llama, linear scaling",
    "llama-dynamic": "Llama, dynamic NTK",
    "mistral": "Mistral",
    "mistral-sliding": "Mistral 7B v0.1 (a window in every layer)",
    "qwen2": "Qwen 2, 2.5",
    "qwen2-yarn": "Qwen 2.5, YaRN",
    "qwen3": "Qwen 3",
    "qwen3-moe": "Qwen 3 MoE",
    "phi3": "Phi-3, Phi-4-mini (LongRoPE, partial)",
    "glm4": "GLM-4-0414 (half of the dimensions, neighbours in pairs)",
    "glm": "GLM-4, through Transformers' code",
    "gemma2": "Gemma 2 (a window in half of the layers)",
    "gemma3": "Gemma 3, text (windows, two RoPE tables)",
    "cohere2": "Command R7B, Command A (windows, layers without RoPE)",
    "exaone4": "EXAONE 4 (windows, layers without RoPE)",
    "smollm3": "SmolLM3 (layers without RoPE), through Transformers' code",
    "granite": "Granite 3",
    "olmo2": "OLMo 2, through Transformers' code",
    "olmo2-dynamic": "OLMo 2 with dynamic NTK, through Transformers' code",
    "olmo3": "OLMo 3 (windows, YaRN in the others), through Transformers' code",
    "stablelm": "StableLM 2 (a quarter of the dimensions)",
    "mixtral": "Mixtral",
    "gpt-oss": "gpt-oss (sinks, windows, experts)",
    "llama4": "Llama 4 (chunked attention, layers without RoPE, experts)",
    "deepseek-v2": "DeepSeek V2 (MLA, experts)",
    "deepseek-v3": "DeepSeek V3, Kimi K2 (MLA, queries' latent, experts)",
    "paddleocr-vl": "PaddleOCR-VL, text alone (M-RoPE)",
    "gpt2": "GPT-2 (learned positions)",
    "jamba": "Jamba (state space beside attention)",
    "qwen3-next": "Qwen 3 Next (linear attention beside full)",
    "mamba": "Mamba",
    "lfm2": "LFM2 (short convolutions)",
    "whisper": "Whisper (encoder-decoder)",
}


def _supported(part: str, name: str) -> str:
    """The rows of one part of docs/results/models.json: what was checked, and what came of it."""
    file = RESULTS / "models.json"
    results = json.loads(file.read_text(encoding="utf-8")).get(part, {}) if file.exists() else {}
    rows = []
    for key, result in sorted(results.items(), key=lambda each: (bool(each[1]["refusal"]), each[0])):
        verdict, worst = _verdict(result, "{:.0e}")
        rows.append(
            [FAMILIES.get(key, key), f"`{result['architecture']}`", verdict, worst, result["engine"], result["date"]]
        )
    return table([name, "class", "", "largest difference", "engine", "date"], rows)


_SETUPS = {
    "models-gpu": "FlashAttention 3",
    "models-gpu-triton": "Triton",
    "models-gpu-flex": "FlexAttention",
    "models-gpu-float32": "Triton, float32",
    "models-gpu-fp8-weights": "FlashAttention 3, FP8 weights",
    "models-gpu-fp8": "FP8 KV cache",
}


def models_on_gpu() -> str:
    """The same on a GPU: families and options by attention backend."""
    rows = []
    for stem, setup in _SETUPS.items():
        file = RESULTS / f"{stem}.json"
        results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        for part in ("families", "combinations"):
            for key, result in sorted(results.get(part, {}).items()):
                verdict, worst = _verdict(result, "{:.3f}")
                bound = "" if result["refusal"] else f"{result['tolerance']:.3f}"
                rows.append([setup, FAMILIES.get(key, key), verdict, worst, bound, _card(result["gpu"])])
    return table(["backend", "family or option", "", "largest difference", "tolerance", "card"], rows)


def _card(name: str) -> str:
    """`H100` of `NVIDIA H100 80GB HBM3`."""
    return name.split()[1]


def _verdict(result: dict[str, Any], form: str) -> tuple[str, str]:
    """What came of a family's checks, and the largest difference of the prompts with everything recomputed."""
    if result["refusal"]:
        return f"ordinary prefill: {result['refusal']}", ""
    checks = result["checks"]
    passed = sum(check["passed"] for check in checks)
    worst = max(check["difference"] for check in checks if check["what"] == "everything recomputed")
    return f"blended, {passed} of {len(checks)} checks passed", form.format(worst)


def families() -> str:
    """Which families are blended."""
    return _supported("families", "family")


def combinations() -> str:
    """Which options of the engine blending is combined with."""
    return _supported("combinations", "option")


def faults() -> str:
    """What `kvblend torture` found, from its result files."""
    kills, damage = (_torture("store")[part] for part in ("kills", "damage"))
    load, orders = _torture("load"), _torture("orders")
    answered = sum(count for what, count in load["requests"].items() if what.endswith("answered"))
    left = sum(load["requests"].values()) - answered
    names = {"client": "client", "server": "server", "VLLM::EngineCor": "engine", "VLLM::Worker": "worker"}
    grown = [f"{shown} {load['memory_growth'][name]:+.1%}" for name, shown in names.items()]
    ratio = orders["last_to_first"]
    rows = [
        [
            "kill -9 during ingest, eviction, release and compaction",
            f"{kills['rounds']} rounds, {sum(kills['killed_during'].values())} writers killed; of "
            f"{kills['acknowledged']:,} acknowledged chunks the {kills['compared']:,} that had not left were compared "
            "bit for bit",
            f"{len(kills['wrong'])} wrong",
        ],
        [
            "chunks flipped, cut and swapped; device full, read-only, gone",
            f"{sum(damage['tried'].values()):,} tried, {sum(damage['refused'].values()):,} refused with a reason",
            f"{len(damage['wrong'])} wrong",
        ],
        [
            f"{load['clients']} streaming clients of `kvblend serve` for {load['seconds'] / 60:g} minutes",
            f"{answered:,} answers, {left:,} streams left early, {load['preemptions']:,} preemptions; memory in the "
            f"second half: {', '.join(grown)}",
            f"{len(load['wrong'])} wrong, stuck or leaked",
        ],
        [
            f"{orders['orders']:,} orders of {orders['per_prompt']} out of {orders['chunks']:,} chunks, the store "
            "bounded to a fifth",
            f"{orders['reused_share']:.1%} of resident tokens reused; speed-up of the last hundred {ratio:.0%} of the "
            "first",
            f"{len(orders['wrong'])} wrong",
        ],
    ]
    return table(["", "", ""], rows)


def _torture(what: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((RESULTS / f"torture-{what}.json").read_text(encoding="utf-8"))
    return loaded


def own_documents() -> str:
    """What documents of the application's own in the ingest context changed."""
    return _compared("own-documents-")


def similar() -> str:
    """What `ingest_context: similar` changed."""
    return _compared("similar-")


def openings() -> str:
    """What `ingest_openings` changed."""
    return _compared("openings-")


def carried() -> str:
    """What `carry` changed."""
    return _compared("carried-")


def taught() -> str:
    """What teaching the reader to read blended chunks changed."""
    return _compared("taught-")


def _compared(prefix: str) -> str:
    """Results of `tools/compare_quality.py`, of files whose names begin so."""
    rows = []
    for name, result in _loaded():
        if not name.startswith(prefix):
            continue
        for group, each in result["comparison"].items():
            for arm, found in each["arms"].items():
                rows.append(
                    [
                        f"`{name.removesuffix('.json')}`, {group} ({each['questions']})",
                        f"`{arm}`",
                        f"{found['kl_before'][0]:.3f} → {found['kl_after'][0]:.3f}",
                        cell(found["kl_ratio"], "{:.2f}"),
                        cell(found["nll_difference"], "{:+.3f}"),
                        cell([100 * value for value in found["f1_difference"]], "{:+.1f}"),
                    ]
                )
    return table(["result, questions", "", "KL", "ratio (95 % interval)", "change of ΔNLL", "of F1, points"], rows)


def calibrations() -> str:
    """What `kvblend calibrate` said of some models."""
    rows = []
    for name, result in _loaded():
        if not name.startswith("calibrate-"):
            continue
        where = result["machine"].get("gpu") or f"{result['machine']['cores']} cores"
        for context, each in result["contexts"].items():
            verdict = each["verdict"]
            rows.append(
                [
                    f"`{name.removesuffix('.json')}`",
                    result["engine"]["model"],
                    f"{sum(result['questions'].values())}, {result['seconds'] / 60:.0f} minutes, {where}",
                    context,
                    f"{verdict['status']}: {verdict['reason']}",
                ]
            )
    return table(["result", "model", "questions", "ingest context", "verdict"], rows)


def risk() -> str:
    """How well the risk tells which answers differ, as `tools/risk_roc.py` found it out."""
    rows = []
    for _, result in _loaded():
        if "held_out" not in result:
            continue
        figures = result["held_out"]["all"]
        every = figures["default"]
        who = f"{result['engine']['model']} ({every['differ']} of {every['questions']} answers differed)"
        second = result["arm"].partition("second_opinion=")[2]
        # Without its first tokens a second opinion says nothing of streams, and rows without one are there already.
        streamed = not second or "disputed_early" in figures
        answers, streams = (
            _judged(figures, "answer", "default"),
            _judged(figures, *("first", "default_first") * streamed),
        )
        rows.append([who, f"{float(second):.0%}" if second else "none", *answers, *streams])
        if second:
            answers, streams = (_judged(figures, each) for each in ("answer_undisputed", "first_undisputed_early"))
            rows.append([who, f"{float(second):.0%}, left out", *answers, *streams])
    caught = ["caught at 10 % false alarms", "at 30 %"]
    head = ["model", "second opinion", "whole answer: area under the ROC curve", *caught]
    return table([*head, "a stream: area under the ROC curve", *caught], rows)


def _judged(figures: dict[str, Any], *kinds: str) -> list[str]:
    """The figures of a risk, and in brackets those of another, as far as there are any."""
    found = [figures[kind] for kind in kinds if kind in figures]
    values = [(row["auc"], row["caught"]["10% false alarms"], row["caught"]["30% false alarms"]) for row in found]
    if not values:
        return [""] * 3
    told = []
    for form, fitted, *default in zip(("{:.2f}", "{:.0%}", "{:.0%}"), *values, strict=True):
        told.append(form.format(fitted) + "".join(f" ({form.format(each)})" for each in default))
    return told


BLOCKS = {
    "faults": faults,
    "own-documents": own_documents,
    "carried": carried,
    "taught": taught,
    "openings": openings,
    "similar": similar,
    "calibrations": calibrations,
    "risk": risk,
    "families": families,
    "combinations": combinations,
    "models-on-gpu": models_on_gpu,
    "configuration": configuration,
    "results": headline,
    "quality": quality,
}
PAGES = (ROOT / "README.md", DOCS / "quality.md", DOCS / "models.md", DOCS / "budget.md", DOCS / "results.md")
"""Where marked blocks stand."""


def with_blocks(text: str) -> str:
    """A Markdown text with its marked blocks made anew."""
    for name, make in BLOCKS.items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        if begin in text:
            before, _, rest = text.partition(begin)
            text = f"{before}{begin}{make()}{end}{rest.partition(end)[2]}"
    return text


def main() -> None:
    """Rewrite the marked blocks, and draw the sweep over prompt lengths and quality against cost."""
    from kvblend_rag.commands import bench_gpu_plot
    from kvblend_rag.quality import plot

    loaded = dict(_loaded())
    bench_gpu_plot.save_plot(loaded["gpu-ttft-llama-3.1-8b.json"], RESULTS / "gpu-ttft-llama-3.1-8b.png")
    for name, result in loaded.items():
        if is_quality(result) and _drawn(result):
            plot.save_plot(result, RESULTS / name.replace(".json", ".png"))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = with_blocks(text)
        if new != text:
            page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
