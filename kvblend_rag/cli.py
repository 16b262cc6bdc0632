"""The command ``kvblend``: reads the arguments and hands over to one file a verb in ``commands``.

Nothing heavy is imported here: help and the verbs that need no engine answer at once.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from kvblend_rag import __version__
from kvblend_rag.commands import terminal
from kvblend_rag.commands.session import EngineOptions
from kvblend_rag.errors import KVBlendError

USAGE_ERROR = 2
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        arguments: without the program's name; None takes the process's own.

    Returns:
        The exit code: 0, 1 when something was found not to be as it should, 2 for an error of use or of
        the machine, 130 after Ctrl-C.
    """
    given = parse(arguments)
    if given.pop("takes_engine", False):
        names = ("model", "store", "config", "eager", "verbose")
        given["engine"] = EngineOptions(**{name: given.pop(name) for name in names})
    module, function = given.pop("handler")
    loud = "rest" in given  # a server's log is the server's own
    try:
        terminal.hush(verbose=loud or ("engine" in given and given["engine"].verbose))
        run = getattr(importlib.import_module(f"kvblend_rag.commands.{module}"), function)
        return int(run(**given) or 0)
    except KVBlendError as error:
        terminal.complain(str(error))
        return USAGE_ERROR
    except KeyboardInterrupt:
        terminal.complain("Interrupted. What was stored stays stored; run it again to go on.")
        return INTERRUPTED


def parse(arguments: Sequence[str] | None) -> dict[str, Any]:
    """Arguments as a dictionary; what a verb leaves to vLLM is in ``rest``. Ends the process as argparse does."""
    parser = _parser()
    given, rest = parser.parse_known_args(arguments)
    values = vars(given)
    if values.pop("takes_rest", False):
        values["rest"] = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return values


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvblend",
        description="Precomputed KV of document chunks, blended inside vLLM.",
        epilog="Start with `kvblend demo`. Settings: KVBLEND_CONFIG_FILE, KVBLEND_* variables; see `kvblend config`.",
    )
    parser.add_argument("--version", action="version", version=f"kvblend {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    _ingest(verbs)
    _ask(verbs)
    _serve(verbs)
    _demo(verbs)
    _verify(verbs)
    _calibrate(verbs)
    _eval(verbs)
    _bench(verbs)
    _store(verbs)
    _torture(verbs)
    _plan_capacity(verbs)
    _config(verbs)
    return parser


def _verb(verbs: Any, name: str, help: str, handler: tuple[str, str], *, engine: bool = False) -> Any:
    parser = verbs.add_parser(name, help=help, description=help)
    parser.set_defaults(handler=handler)
    if engine:
        parser.set_defaults(takes_engine=True)
        group = parser.add_argument_group("engine and store")
        group.add_argument("--model", metavar="DIR|NAME", help="folder or hub name; the bundled reader when not given")
        group.add_argument("--store", metavar="DIR", help="folder of the chunk store")
        group.add_argument("--config", metavar="FILE", help="YAML file of settings")
        group.add_argument("--eager", action="store_true", help="start faster: leave vLLM's compilation out")
        group.add_argument("--verbose", action="store_true", help="show vLLM's own messages")
    return parser


def _json(parser: Any) -> None:
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="also write JSON, to standard output without a FILE"
    )


def _ingest(verbs: Any) -> None:
    parser = _verb(
        verbs, "ingest", "Precompute the KV of a folder of text and Markdown.", ("ingest", "run"), engine=True
    )
    parser.add_argument("folder", metavar="DIR|DATASET", help="every .md and .txt file under it is read")
    bulk = parser.add_argument_group("bulk ingest, on Ray Data")
    bulk.add_argument(
        "--ray", action="store_true", help="DATASET: parquet files, JSON lines or texts; no index is made"
    )
    bulk.add_argument("--ray-address", metavar="ADDRESS", help="of a Ray cluster; started on this machine without")
    bulk.add_argument("--engines", type=int, default=1, metavar="N", help="at work at the same time (default 1)")
    bulk.add_argument("--batch", type=int, default=64, metavar="N", help="documents an engine computes together")
    bulk.add_argument("--format", choices=("parquet", "jsonl", "text"), help="where the files' names don't tell")
    bulk.add_argument("--id-column", default="id", metavar="NAME", help="(default id)")
    bulk.add_argument("--text-column", default="text", metavar="NAME", help="(default text)")
    bulk.add_argument(
        "--operation-column", default="operation", metavar="NAME", help="upsert or delete (default operation)"
    )
    bulk.add_argument("--dead-letters", metavar="FILE", help="gets the rows that fail, with the reasons, as JSON lines")


def _ask(verbs: Any) -> None:
    parser = _verb(verbs, "ask", "Answer questions from what was ingested.", ("ask", "run"), engine=True)
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help="none: type them, one a line")
    parser.add_argument("-k", type=int, default=5, help="documents a prompt (default 5)")
    parser.add_argument("--plain", action="store_true", help="ask plain vLLM as well, and compare")
    parser.add_argument("--max-tokens", type=int, default=128, help="longest answer (default 128)")
    _json(parser)


def _serve(verbs: Any) -> None:
    parser = _verb(verbs, "serve", "Serve a model over HTTP: `vllm serve` with blending.", ("serve", "run"))
    parser.usage = "kvblend serve MODEL [--store DIR] [--set NAME=VALUE] [any option of vllm serve]"
    parser.allow_abbrev = False  # what looks like the beginning of an option of ours may be one of vLLM's
    parser.set_defaults(takes_rest=True)
    parser.add_argument("--store", metavar="DIR", help="folder of the chunk store")
    parser.add_argument("--kvblend-config", metavar="FILE", help="YAML file of settings (--config is vLLM's)")
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="NAME=VALUE", help="a setting; may be repeated"
    )
    parser.add_argument("--vllm-help", nargs="?", const="all", metavar="GROUP", help="show the options of vllm serve")


def _demo(verbs: Any) -> None:
    parser = _verb(
        verbs, "demo", "Ask real questions of plain vLLM and of blending, side by side.", ("demo", "run"), engine=True
    )
    parser.add_argument("--docs", metavar="DIR", help="your folder of text or Markdown; Fennick's when not given")
    parser.add_argument("--questions", type=int, default=12, metavar="N", help="how many are asked (default 12)")
    parser.add_argument("--ask", action="append", metavar="QUESTION", help="ask this; may be repeated")
    parser.add_argument("-k", type=int, default=6, choices=range(3, 7), help="documents a prompt (default 6)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the arms")
    _json(parser)


def _verify(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "verify",
        "Check on your model that everything recomputed equals plain vLLM.",
        ("verify", "run"),
        engine=True,
    )
    parser.add_argument("--docs", metavar="DIR", help="texts to check with; Fennick's when not given")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N", help="prompt lengths, in tokens")
    _json(parser)


def _eval(verbs: Any) -> None:
    parser = _verb(
        verbs, "eval", "Measure what blending keeps of the answers, on your questions.", ("eval", "run"), engine=True
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help="questions as JSON lines, or folders of such files")
    parser.add_argument("--two-chunk", type=int, default=0, metavar="N", help="also ask N questions made here")
    parser.add_argument(
        "--aggregate", type=int, default=0, metavar="N", help="and N more, half of which need every document"
    )
    parser.add_argument(
        "--arms", nargs="+", metavar="ARM", help="plain, reuse, SELECTOR:RATIO[:OPTION=VALUE]; any with @CONTEXT behind"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="at most N questions of each file")
    parser.add_argument("--chunks", type=int, metavar="N", help="at most N documents a question")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="questions stored at a time (default 16)")
    parser.add_argument("--timed", type=int, default=5, metavar="N", help="measure TTFT on N questions (default 5)")
    parser.add_argument("--minutes", type=float, metavar="N", help="ask for about N minutes; the rest is left out")
    parser.add_argument("--markdown", dest="markdown_file", metavar="FILE", help="also write the tables as Markdown")
    parser.add_argument("--plot", dest="plot_file", metavar="FILE", help="also draw quality against cost")
    _json(parser)


def _calibrate(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "calibrate",
        "Measure how well a model blends, and write a verdict that engines heed.",
        ("calibrate", "run"),
        engine=True,
    )
    # The same as --model; without a default, or it would overwrite that.
    parser.add_argument("model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help="as --model")
    parser.add_argument("--docs", metavar="DIR", help="texts that questions are made from; Fennick's when not given")
    parser.add_argument("--questions", metavar="FILE", help="questions with documents, in place of made ones")
    parser.add_argument(
        "--count", type=int, default=384, metavar="N", help="how many are asked at most (default 384): see --minutes"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=20.0,
        metavar="N",
        help="ask until these tell enough, or for about N minutes (default 20)",
    )
    parser.add_argument(
        "--contexts", nargs="+", default=["document", "long"], metavar="KIND", help="ingest contexts to measure"
    )
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="ways of blending, as question:0.2")
    parser.add_argument(
        "--max-loss", type=float, default=0.05, metavar="NATS", help="loss a gold token that is accepted (default 0.05)"
    )
    _json(parser)


def _bench(verbs: Any) -> None:
    benches = verbs.add_parser("bench", help="Measure.", description="Measure.").add_subparsers(
        metavar="WHAT", required=True
    )
    parser = _verb(benches, "ttft", "Time to first token, plain and blended.", ("bench", "ttft"), engine=True)
    parser.add_argument("--prompt-tokens", type=int, default=2000, metavar="N")
    parser.add_argument("--ratio", type=float, default=0.15, help="share of reused tokens recomputed (default 0.15)")
    parser.add_argument("--span", type=int, default=None, help="length of recomputed spans, in tokens")
    parser.add_argument("--selectors", nargs="+", default=["first", "question", "none"], metavar="NAME")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    _json(parser)
    parser = _verb(benches, "ingest", "Ingest against vLLM's own prefill rate.", ("bench", "ingest"), engine=True)
    parser.add_argument("--repeats", type=int, default=3)
    _json(parser)
    parser = _verb(benches, "gpu", "TTFT, ingest and load on a GPU, on random weights.", ("bench", "gpu"))
    parser.add_argument("--shape", default="llama-3.1-8b", metavar="NAME", help="of which model")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768], metavar="N", help="prompt tokens")
    parser.add_argument("--spans", type=int, nargs="+", default=[64, 16], metavar="N")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--load", type=float, default=0.0, metavar="SECONDS", help="of each run under load; 0: none")
    parser.add_argument("--sweep", type=int, nargs="+", default=[], metavar="N", help="prompt tokens; 5 to 20 %% there")
    parser.add_argument(
        "--device-gb", type=float, default=0.0, metavar="GIB", help="a second engine with chunks in GPU memory; 0: none"
    )
    parser.add_argument("--encoding", default="none", metavar="NAME", help="as which chunks are kept (default none)")
    parser.add_argument("--plot", metavar="FILE", help="of the sweep (.png, .svg)")
    parser.add_argument("--timelines", metavar="DIR", help="folder for Chrome traces")
    parser.add_argument("--eager", action="store_true", help="start faster: leave vLLM's compilation out")
    _json(parser)
    parser = _verb(benches, "planner", "What the planner decides against plain vLLM, in a sweep.", ("bench", "planner"))
    parser.add_argument("--shape", default="small", metavar="NAME", help="of which model; random weights")
    parser.add_argument("--chunk-tokens", type=int, default=200, metavar="N", help="of a usual chunk (default 200)")
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="prompts a case (default 9)")
    parser.add_argument(
        "--remote",
        action="append",
        default=[],
        dest="remotes",
        metavar="URL",
        help="a remote tier that is slow; again for more",
    )
    parser.add_argument("--eager", action="store_true", help="start faster: leave vLLM's compilation out")
    _json(parser)
    parser = _verb(
        benches, "load", "Throughput, and the time between tokens, under load; random weights.", ("bench", "load")
    )
    parser.add_argument("--shape", default="small", metavar="NAME", help="of which model; random weights")
    parser.add_argument("--chunk-tokens", type=int, default=128, metavar="N", help="of each chunk (default 128)")
    parser.add_argument("--per-prompt", type=int, default=6, metavar="N", help="chunks in a prompt (default 6)")
    parser.add_argument("--seconds", type=float, default=20.0, metavar="S", help="of each run (default 20)")
    parser.add_argument("--eager", action="store_true", help="start faster: leave vLLM's compilation out")
    _json(parser)
    parser = _verb(
        benches, "encodings", "Size and error of KV at rest; needs a store, no engine.", ("bench", "encodings")
    )
    parser.add_argument("--chunks", type=int, default=32, help="read at most so many (default 32)")
    parser.add_argument("--store", metavar="DIR", help="folder of the chunk store")
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings")
    _json(parser)
    parser = _verb(benches, "match", "Finding stored chunks in a prompt; needs no engine.", ("bench", "match"))
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--prompt-tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=50)
    _json(parser)


def _store(verbs: Any) -> None:
    actions = verbs.add_parser(
        "store", help="Look after the chunk store.", description="Look after the chunk store."
    ).add_subparsers(metavar="ACTION", required=True)
    stats = _verb(actions, "stats", "What the store holds.", ("store", "stats"))
    check = _verb(actions, "check", "Read every file and every row.", ("store", "check"))
    check.add_argument("--repair", action="store_true", help="mend what is wrong")
    gc = _verb(actions, "gc", "Remove what no document holds, leftovers, and what exceeds the bound.", ("store", "gc"))
    gc.add_argument("--max-gb", type=float, help="bound in GiB; the configured max_disk_gb when not given")
    sync = _verb(actions, "sync", "List here what other hosts put into the remote tiers.", ("store", "sync"))
    sync.add_argument("--every", type=float, metavar="SECONDS", help="again and again, until Ctrl-C")
    delete = _verb(actions, "delete", "Forget documents, or everything.", ("store", "delete"))
    delete.add_argument(
        "documents", nargs="*", metavar="DOCUMENT", help="document ids, as `kvblend store stats` lists them"
    )
    delete.add_argument("--all", action="store_true", dest="everything", help="the whole store")
    for parser in (stats, check, gc, sync, delete):
        parser.add_argument("--store", metavar="DIR", help="folder of the chunk store")
        parser.add_argument("--config", metavar="FILE", help="YAML file of settings")
    _json(stats)


def _torture(verbs: Any) -> None:
    kinds = verbs.add_parser(
        "torture", help="Try to break it.", description="Try to break it, on data of its own."
    ).add_subparsers(metavar="WHAT", required=True)
    help = "Kill writers at random instants; flip, cut and swap files; fill, lock and remove the device."
    parser = _verb(kinds, "store", help, ("torture", "store"))
    parser.add_argument("--rounds", type=int, default=100, help="how often writers are killed (default 100)")
    parser.add_argument("--writers", type=int, default=2, help="processes that write at once (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="of what they do and when they die")
    _json(parser)

    help = "Streaming clients at once, some of whom leave; every answer is compared."
    parser = _verb(kinds, "load", help, ("torture", "load"))
    parser.add_argument("--clients", type=int, default=500, help="at once (default 500)")
    parser.add_argument("--minutes", type=float, default=10.0, help="of load (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and clients")
    _json(parser)
    help = "Chunks in ever new orders, on a store that holds a fifth of them."
    parser = _verb(kinds, "orders", help, ("torture", "orders"))
    parser.add_argument("--orders", type=int, default=1000, help="prompts (default 1,000)")
    parser.add_argument("--chunks", type=int, default=1000, help="documents (default 1,000)")
    parser.add_argument("--per-prompt", type=int, default=14, metavar="N", help="chunks in a prompt (default 14)")
    parser.add_argument("--seed", type=int, default=0, help="of everything")
    _json(parser)


def _plan_capacity(verbs: Any) -> None:
    help = "What KV takes, what keeping it costs a tier, and from which bandwidth on it pays."
    parser = _verb(verbs, "plan-capacity", help, ("plan_capacity", "run"))
    parser.add_argument("--model", default="Llama-3.1-8B", metavar="NAME|DIR", help="of the table, or a folder")
    parser.add_argument("--tokens", type=float, default=1e6, help="of all documents (default a million)")
    parser.add_argument("--bytes-per-value", type=float, default=2.0, help="2: bfloat16 (default); 4: float32")
    parser.add_argument("--prefill-rate", type=float, help="tokens/s; estimated from --teraflops when not given")
    parser.add_argument("--teraflops", type=float, default=400.0, help="done in a prefill (default 400: an H100)")
    parser.add_argument("--ratio", type=float, default=0.15, help="share of reused tokens recomputed (default 0.15)")
    parser.add_argument("--machine-hour", type=float, default=3.0, help="dollars an hour of what prefills (default 3)")
    parser.add_argument("--price", nargs="+", default=[], metavar="TIER=DOLLARS", help="a GB and month")
    parser.add_argument("--bandwidth", nargs="+", default=[], metavar="TIER=GB/S", help="into the device's memory")
    _json(parser)


def _config(verbs: Any) -> None:
    parser = _verb(verbs, "config", "Print the effective configuration.", ("config", "run"))
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings")
    _json(parser)


if __name__ == "__main__":
    sys.exit(main())
