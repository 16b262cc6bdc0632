"""Asks an engine every question in every way: answers, the gold answer's likelihood, and reports.

Questions are taken in batches: their documents are ingested, every arm asks all of them at once, and the
documents are released. Before each pass vLLM's prefix cache is emptied, or an arm would find the KV of the
one before.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

from kvblend_rag.calibration.risk import Signals, signals_of
from kvblend_rag.conversation.sampling import Sampling
from kvblend_rag.engine import Engine
from kvblend_rag.kvblend import KVBlend
from kvblend_rag.output import CompletionOutput, RequestOutput, last
from kvblend_rag.quality.arms import Arm
from kvblend_rag.quality.forcing import distributions, forcing
from kvblend_rag.quality.metrics import Distribution
from kvblend_rag.quality.questions import Question
from kvblend_rag.report import BlendReport
from kvblend_rag.second_opinion import second_options, with_second

GOLD_TOKENS = 48
"""A longer gold answer is measured up to here."""

ANSWER_TOKENS = 32
"""Longest greedy answer."""


@dataclass(frozen=True)
class Asked:
    """A question as the model gets it."""

    question: Question
    prompt: list[int]
    gold: list[int]
    """Token ids of the first accepted answer."""


@dataclass(frozen=True)
class Observation:
    """One question, asked in one way."""

    answer: str
    """The greedy answer."""
    logprobs: tuple[float, ...]
    """Of the gold answer's tokens, in nats."""
    distributions: tuple[Distribution, ...]
    """Of the next token at each of the gold answer's positions."""
    report: BlendReport
    signals: Signals = field(default_factory=Signals)
    """Of the greedy answer."""
    completion: CompletionOutput | None = None
    """The greedy answer, with the two likeliest tokens of each step."""


Observations = dict[str, list[Observation]]
"""By arm, one a question."""


def prepare(engine: Engine, questions: Iterable[Question], render: Callable[[Question], list[int]]) -> list[Asked]:
    """The questions that fit into the model's context, as token ids.

    Args:
        engine: whose tokenizer and context it is.
        questions: to be asked.
        render: makes a question's prompt, its documents in it as they are.
    """
    asked = []
    for question in questions:
        prompt = render(question)
        # Behind a template's line break an answer begins as it is, behind "Answer:" with a space.
        space = "" if engine.tokenizer.decode(prompt[-1:])[-1:].isspace() else " "
        gold = engine.tokenizer.encode(space + question.answers[0], add_special_tokens=False)[:GOLD_TOKENS]
        if len(prompt) + max(ANSWER_TOKENS, len(gold)) <= engine.info.max_model_len:
            asked.append(Asked(question, list(prompt), list(gold)))
    return asked


def observe(
    kvblend: KVBlend,
    asked: Sequence[Asked],
    arms: Sequence[Arm],
    *,
    batch: int = 16,
    seconds: float | None = None,
    progress: bool = True,
) -> Observations:
    """Ask every question in every way.

    Args:
        kvblend: its engine was started with ``forcing.engine_arguments()``; its store takes up a batch's
            documents, and gives them back.
        asked: the questions.
        arms: the ways.
        batch: questions at a time.
        seconds: after so many no further batch is begun, and the last questions are left out.
        progress: show a progress bar.

    Raises:
        StoreError: the documents can't be stored.
        EngineUnavailable: the engine does not force tokens, or died.
    """
    observed: Observations = {arm.name: [] for arm in arms}
    begun = time.monotonic()
    passes = sum(3 if _second(kvblend, arm) else 2 for arm in arms)
    with tqdm(total=passes * len(asked), desc="Asking", unit="answer", disable=not progress) as bar:
        for start in range(0, len(asked), batch):
            if start and seconds is not None and time.monotonic() - begun > seconds:
                break
            several = asked[start : start + batch]
            holders = [_holder(each.question) for each in several for _ in each.question.documents]
            kvblend.ingest(
                [document for each in several for document in each.question.documents],
                document_ids=holders,
                progress=False,
            )
            try:
                for arm in arms:
                    observed[arm.name] += _batch(kvblend, several, arm, bar)
            finally:
                kvblend.release(sorted(set(holders)))
    return observed


def _holder(question: Question) -> str:
    return f"quality/{question.set}/{question.id}"


def _batch(kvblend: KVBlend, asked: Sequence[Asked], arm: Arm, bar: tqdm[Any]) -> list[Observation]:
    engine = kvblend.engine
    options = {"tenant": kvblend.config.tenant, **arm.options}
    greedy = engine.sampling(Sampling(temperature=0.0, max_tokens=ANSWER_TOKENS, logprobs=True, top_logprobs=2))
    answers = _all(engine, [_answer(kvblend, each.prompt, greedy, arm.options) for each in asked], bar)
    seconds: list[CompletionOutput | None] = [None] * len(asked)
    second = _second(kvblend, arm)
    if second is not None:
        again = _all(engine, [engine.generate(each.prompt, greedy, options=second) for each in asked], bar)
        seconds = [each.outputs[0] for each in again]
    # What was answered by a full prefill for its answer's sake (`max_risk`) is measured as one.
    ways = [options if answer.report.blended else {**options, "blend": False} for answer in answers]
    forced = _all(
        engine,
        [
            engine.generate(each.prompt, forcing(engine, each.gold), options=way)
            for each, way in zip(asked, ways, strict=True)
        ],
        bar,
    )
    observations = []
    for each, answer, likely, other in zip(asked, answers, forced, seconds, strict=True):
        logprobs, steps = distributions(likely, each.gold)
        own = answer.outputs[0]
        signals = signals_of(own.token_ids, own.logprobs, Signals.before_the_answer(answer.report))
        if other is not None and answer.report.blended:
            signals = with_second(signals, own, other)
        observations.append(Observation(own.text.strip(), tuple(logprobs), tuple(steps), answer.report, signals, own))
    return observations


def _answer(
    kvblend: KVBlend, prompt: list[int], sampling: Any, options: Mapping[str, Any]
) -> AsyncGenerator[RequestOutput, None]:
    """With every signal, and judged only where the arm says so: an engine by itself takes them and judges nothing."""
    if kvblend.config.for_request(options).max_risk < 1:
        return kvblend.stream(prompt, sampling, blend=options)
    watched = {"tenant": kvblend.config.tenant, **options, "max_risk": 0.0}
    return kvblend.engine.generate(prompt, sampling, options=watched)


def _second(kvblend: KVBlend, arm: Arm) -> dict[str, Any] | None:
    """The options of an arm's second opinions; None where it names none, or judges by itself."""
    own = kvblend.config.for_request(arm.options)
    if "second_opinion" not in arm.options or own.max_risk < 1:
        return None
    return second_options({"tenant": kvblend.config.tenant, **arm.options}, own)


def _all(
    engine: Engine, requests: Sequence[AsyncGenerator[RequestOutput, None]], bar: tqdm[Any]
) -> list[RequestOutput]:
    """The last output of each request, all at once, from an empty prefix cache."""

    async def one(outputs: AsyncGenerator[RequestOutput, None]) -> RequestOutput:
        final = await last(outputs)
        bar.update()
        return final

    async def together() -> list[RequestOutput]:
        await engine.reset_prefix_cache()
        return list(await asyncio.gather(*map(one, requests)))

    return engine.run(together())


__all__ = ["ANSWER_TOKENS", "GOLD_TOKENS", "Asked", "Observation", "Observations", "observe", "prepare"]
