"""``kvblend verify``: on the user's model and machine, does blending give what vLLM gives, where it must?"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from kvblend_rag.commands import terminal
from kvblend_rag.commands.arms import Arms, greedy
from kvblend_rag.commands.machine import engine_facts, machine
from kvblend_rag.commands.session import EngineOptions, started
from kvblend_rag.conversation.sampling import Sampling
from kvblend_rag.demo.library import BUNDLED, load_documents
from kvblend_rag.errors import ConfigError
from kvblend_rag.quality.judge import Limits
from kvblend_rag.quality.measure import audit

if TYPE_CHECKING:
    from kvblend_rag.llm import LLM
    from kvblend_rag.output import RequestOutput

TOKENS = 16
_LENGTHS = (200, 500, 1000, 1900)
_LEAST_TOLERANCE = {"float32": 1e-4, "bfloat16": 2**-5}
"""In bfloat16 two steps of a logit between 2 and 4: a token alone is computed in another way than in a prefill."""
_COARSE_TOLERANCE = 0.01
_CACHED_SHARES = (2, 3, 4, 5, 7)
"""Of a prompt one half, a third, … is in the prefix cache: as many shapes of batches for the rest."""
_CHOICES = 5
"""Log-probabilities a step, to judge a near tie."""

_REQUESTS: dict[str, tuple[dict[str, Any], bool]] = {
    # vLLM draws several answers only with some temperature; from one candidate there is one to draw.
    "several answers of one prompt": ({"n": 2, "temperature": 1.0, "top_k": 1}, True),
    "an answer of a given form": ({"regex": "[0-9a-f]{12}", "extra": {}}, True),
    "penalties on the prompt's tokens": ({"repetition_penalty": 1.3}, True),
    "log-probabilities of the prompt": ({"extra": {"ignore_eos": True, "prompt_logprobs": 1}}, False),
}
"""Settings that people combine blending with, and whether the request is blended."""


@dataclass(frozen=True)
class Check:
    """One comparison with plain vLLM."""

    what: str
    prompt_tokens: int
    from_store: int
    """Prompt tokens that a stored chunk holds, recomputed ones among them."""
    difference: float
    """Greatest difference in log-probability; infinite where another token came that was no near tie."""
    passed: bool
    remark: str = ""


def run(
    *, engine: EngineOptions, docs: str | None = None, lengths: Sequence[int] | None = None, json: str | None = None
) -> int:
    """Check exactness, rotation, combinations, isolation and a damaged chunk; the user's own store is not touched.

    Args:
        engine: model; the store is a temporary one.
        docs: folder of texts that prompts are made of.
        lengths: of the prompts, in tokens.
        json: where to write the result as JSON.

    Returns:
        0 when all is equal, 1 otherwise.

    Raises:
        KVBlendError: no such model, one that can't be blended, or no engine.
    """
    console = terminal.prose(json)
    texts = [document.content for document in load_documents(docs or BUNDLED)]
    with tempfile.TemporaryDirectory(prefix="kvblend-verify-") as folder:
        # On disk alone, or a damaged file would hide behind its copy in memory.
        config = engine.resolve().replace(store_path=folder, local_device="disk", enable_blending=True, planner=False)
        with started(config, verbose=engine.verbose) as llm:
            result = check(llm, texts, lengths or _LENGTHS)
            result["engine"] = engine_facts(llm.kvblend.engine.info, bool(config.engine_args.get("enforce_eager")))
    result["machine"] = machine()
    console.print(_table(result))
    console.print(
        f"Compared: log-probabilities of {TOKENS} greedy tokens. Tolerance {result['tolerance']:.1e}: "
        f"{result['tolerance_reason']}."
    )
    if result["equal"]:
        console.print(f"[bold green]Equal[/]: {escape(config.model)} gives plain vLLM's answers.")
    else:
        failed = sum(not each["passed"] for each in result["checks"])
        console.print(
            f"[bold red]Not equal[/]: {failed} of {len(result['checks'])} checks failed; don't blend this model."
        )
    terminal.write_json(result, json)
    return 0 if result["equal"] else 1


def check(llm: LLM, texts: Sequence[str], lengths: Sequence[int]) -> dict[str, Any]:
    """All comparisons on an engine whose store is on disk alone.

    Args:
        llm: the engine.
        texts: what chunks are made of; they are ingested.
        lengths: of the prompts, in tokens; those that don't fit the context are passed over.

    Raises:
        ConfigError: no length fits, or the texts are too short.
    """
    info = llm.kvblend.engine.info
    fitting = sorted({length for length in lengths if 64 <= length <= info.max_model_len - TOKENS})
    if not fitting:
        raise ConfigError(f"No prompt length between 64 and {info.max_model_len - TOKENS} was given.")
    llm.kvblend.ingest(list(texts), progress=False)
    arms = Arms(llm)
    prompts = [_prompt(llm, texts, length) for length in fitting]
    plain = [_answer(arms.ask(prompt, _sampling(), blend=False)) for prompt in prompts]
    tolerance, reason = _tolerance(llm, prompts, plain)
    checks = [_everything(arms, prompt, ordinary, tolerance) for prompt, ordinary in zip(prompts, plain, strict=True)]
    checks += _together(llm, prompts, plain, tolerance)
    checks.append(_moved(llm, texts))
    # vLLM 0.32's rejection sampler ends the engine on top_k in a step in which nothing was drafted.
    drafts = bool(llm.kvblend.config.engine_args.get("speculative_config"))
    checks += [
        _combined(llm, what, settings, prompts[-1], tolerance, blended=blended)
        for what, (settings, blended) in _REQUESTS.items()
        if not (drafts and "top_k" in settings)
    ]
    checks.append(_isolation(llm, arms, prompts[-1], plain[-1], tolerance))
    checks.append(_damaged(llm, arms, prompts[-1], plain[-1], tolerance))
    return {
        "model": info.model,
        "tokens_compared": TOKENS,
        "tolerance": tolerance,
        "tolerance_reason": reason,
        "checks": [asdict(each) for each in checks],
        "equal": all(each.passed for each in checks),
    }


@dataclass(frozen=True)
class _Answer:
    tokens: tuple[int, ...]
    logprobs: tuple[dict[int, float], ...]
    report: Any

    def difference(self, other: _Answer, near: float, penalised: bool = False) -> float:
        """Greatest difference, up to the first step at which two candidates were as good as equal.

        As good as equal: ``near`` up for one and down for the other turns them round.
        Penalties choose by scores that log-probabilities don't show: with them a step at which the answers part is
        judged by the candidates that both name.
        """
        worst = 0.0
        for step, (own, others) in enumerate(zip(self.tokens, other.tokens, strict=False)):
            mine, theirs = self.logprobs[step], other.logprobs[step]
            if own != others and penalised:
                both = mine.keys() & theirs.keys()
                return max([worst, *(abs(mine[token] - theirs[token]) for token in both)]) if both else float("inf")
            if own != others:
                return worst if mine[own] - mine.get(others, float("-inf")) <= 2 * near else float("inf")
            worst = max(worst, abs(mine[own] - theirs[own]))
        return worst


def _answer(output: RequestOutput, index: int = 0) -> _Answer:
    completion = output.outputs[index]
    steps = tuple({token: each.logprob for token, each in step.items()} for step in completion.logprobs or ())
    return _Answer(completion.token_ids, steps, output.report)


def _sampling() -> Any:
    return greedy(TOKENS, logprobs=_CHOICES, ignore_eos=True)


def _prompt(llm: LLM, texts: Sequence[str], length: int) -> list[int]:
    """A header, whole texts with a blank line between them, and a question, cut to the length at the front."""
    tokenizer = llm.get_tokenizer()
    question = tokenizer.encode("\n\nQuestion: What is said above?\nAnswer:", add_special_tokens=False)
    header = tokenizer.encode("Answer from the documents.\n\n")
    body: list[int] = []
    for text in texts:
        body += tokenizer.encode(text + "\n\n", add_special_tokens=False)
        if len(body) >= length:
            break
    room = length - len(header) - len(question)
    if len(body) < room:
        raise ConfigError(f"The texts have {len(body)} tokens, too few for a prompt of {length}.")
    return [*header, *body[:room], *question]


def _tolerance(llm: LLM, prompts: Sequence[list[int]], plain: Sequence[_Answer]) -> tuple[float, str]:
    """In float32 on a CPU a constant; elsewhere what plain runs of different batch shapes differ by, or the least.

    Mixtures of experts need all the shapes: where two experts are nearly tied, rounding takes the other one.
    """
    info = llm.kvblend.engine.info
    dtype, least = info.dtype, _LEAST_TOLERANCE.get(info.dtype, _COARSE_TOLERANCE)
    if dtype == "float32" and info.device == "cpu":
        return least, "float32"
    _reset(llm)
    others = llm.generate(prompts, _sampling(), blend={"blend": False})
    for prompt in prompts:
        for share in _CACHED_SHARES:
            _reset(llm)
            llm.generate([prompt[: len(prompt) // share]], greedy(1), blend={"blend": False})
            others += llm.generate([prompt], _sampling(), blend={"blend": False})
    expected = [*plain, *(one for one in plain for _ in _CACHED_SHARES)]
    noise = max(one.difference(_answer(other), near=float("inf")) for one, other in zip(expected, others, strict=True))
    reason = (
        f"{dtype}: twice what plain vLLM differs by alone, in a batch and behind a cached prefix, {noise:.1e}, "
        f"or {least:.1e}"
    )
    return max(2 * noise, least), reason


def _compared(
    what: str,
    answer: _Answer,
    ordinary: _Answer,
    tolerance: float,
    *,
    blended: bool = True,
    penalised: bool = False,
) -> Check:
    report = answer.report
    difference = ordinary.difference(answer, near=tolerance, penalised=penalised)
    used = report.reused_tokens + report.recomputed_tokens
    as_planned = report.on_blended_kv == blended
    remark = "it was blended" if report.blended and not blended else report.reason or ""
    if blended and not as_planned:
        remark = f"nothing was blended: {report.reason}"
    return Check(what, report.prompt_tokens, used, difference, difference <= tolerance and as_planned, remark)


def _everything(arms: Arms, prompt: list[int], ordinary: _Answer, tolerance: float) -> Check:
    answer = _answer(arms.ask(prompt, _sampling(), selector="everything", ratio=1.0))
    return _compared("everything recomputed", answer, ordinary, tolerance)


def _together(llm: LLM, prompts: Sequence[list[int]], plain: Sequence[_Answer], tolerance: float) -> Iterable[Check]:
    _reset(llm)
    outputs = llm.generate(prompts, _sampling(), blend={"selector": "everything", "ratio": 1.0})
    checks = [
        _compared("the same, all at once", _answer(output), ordinary, tolerance)
        for output, ordinary in zip(outputs, plain, strict=True)
    ]
    return [max(checks, key=lambda each: (not each.passed, each.difference))]


def _moved(llm: LLM, texts: Sequence[str]) -> Check:
    """Stored KV, keys rotated to another position, against what the model computes there."""
    found = audit(llm.kvblend, list(texts))
    bound = Limits().deviation_bound(found)
    remark = f"a relative error; at most {bound:.1e}, and the largest is in {found.where}"
    return Check("stored KV at another position", 0, 0, found.error, found.error <= bound, remark)


def _combined(
    llm: LLM, what: str, settings: dict[str, Any], prompt: list[int], tolerance: float, *, blended: bool
) -> Check:
    """A request of a kind, everything recomputed, beside the same of plain vLLM."""
    engine = llm.kvblend.engine
    common = {"temperature": 0.0, "max_tokens": TOKENS, "top_logprobs": _CHOICES, "extra": {"ignore_eos": True}}
    sampling = engine.sampling(Sampling(**{**common, **settings}))
    answers = []
    for blend in ({"blend": False}, {"selector": "everything", "ratio": 1.0}):
        _reset(llm)
        answers.append(llm.generate([prompt], sampling, blend=blend)[0])
    ordinary, found = answers
    penalised = "repetition_penalty" in settings
    checks = [
        _compared(
            what, _answer(found, index), _answer(ordinary, index), tolerance, blended=blended, penalised=penalised
        )
        for index in range(len(ordinary.outputs))
    ]
    return max(checks, key=lambda each: (not each.passed, each.difference))


def _isolation(llm: LLM, arms: Arms, prompt: list[int], ordinary: _Answer, tolerance: float) -> Check:
    """A plain request right after one with approximate KV, the prefix cache as it then is."""
    arms.ask(prompt, _sampling(), selector="none")
    answer = _answer(llm.generate([prompt], _sampling(), blend={"blend": False})[0])
    return _compared("plain, after a blended request", answer, ordinary, tolerance, blended=False)


def _damaged(llm: LLM, arms: Arms, prompt: list[int], ordinary: _Answer, tolerance: float) -> Check:
    """One bit of a stored chunk turned over: an ordinary prefill, and the reason."""
    from kvblend_rag.store.layout import StoreLayout

    used = arms.ask(prompt, greedy(1), selector="none").report
    key = used.chunks[0].key if used.chunks else ""
    for path in StoreLayout(Path(llm.kvblend.config.store_path)).files_of(key) if key else ():
        with path.open("r+b") as file:
            file.seek(-5, 2)
            byte = file.read(1)[0]
            file.seek(-5, 2)
            file.write(bytes([byte ^ 1]))
    answer = _answer(arms.ask(prompt, _sampling(), selector="none"))
    compared = _compared("with a damaged chunk in the store", answer, ordinary, tolerance, blended=False)
    told = bool(key) and bool(answer.report.reason)
    return Check(
        **{**asdict(compared), "passed": compared.passed and told, "remark": answer.report.reason or "not noticed"}
    )


def _reset(llm: LLM) -> None:
    engine = llm.kvblend.engine
    engine.run(engine.reset_prefix_cache())


def _table(result: dict[str, Any]) -> Table:
    table = Table(title=f"kvblend verify {escape(result['model'])}")
    for name in ("checked against plain vLLM", "prompt tokens", "from stored chunks", "greatest difference", ""):
        table.add_column(name, justify="left" if name.startswith("checked") or not name else "right")
    for each in result["checks"]:
        mark = "[green]equal[/]" if each["passed"] else "[red]differs[/]"
        remark = f" [dim]{escape(each['remark'])}[/]" if each["remark"] else ""
        table.add_row(
            each["what"],
            f"{each['prompt_tokens']:,}",
            f"{each['from_store']:,}",
            f"{each['difference']:.1e}",
            mark + remark,
        )
    return table


__all__ = ["TOKENS", "Check", "check", "run"]
