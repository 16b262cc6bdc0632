"""Measure: one model behind one ingest context, on a running engine, for ``judge``."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvblend_rag.blend.chunk import TokenIds, model_of, namespace
from kvblend_rag.calibration.risk import Signals
from kvblend_rag.calibration.verdict import SETTINGS
from kvblend_rag.config import BlendConfig, ScoreLayers, as_options
from kvblend_rag.errors import ChunkRejected
from kvblend_rag.kvblend import KVBlend
from kvblend_rag.quality.arms import PLAIN, Arm, parse_arm
from kvblend_rag.quality.judge import Limits, decided, promising
from kvblend_rag.quality.measurement import Cell, Deviation, Identity, Measurement
from kvblend_rag.quality.observe import Asked, Observation, Observations, observe
from kvblend_rag.quality.questions import Question
from kvblend_rag.quality.score import Sample, score
from kvblend_rag.second_opinion import with_second
from kvblend_rag.selectors import get_selector
from kvblend_rag.selectors.base import Evidence

BUDGETS = ("reuse", "question:0.1", "question:0.2", "question:0.35", "question:0.5")
"""Fixed budgets that are measured."""

ADAPTIVE = ("question:0.5:coverage=0.5", "question:0.5:coverage=0.75")
"""Adaptive budgets that are measured, at most half of the chunk tokens."""

SPANS = (16, 64)
LAYERS: tuple[ScoreLayers, ...] = ("later", "all", "upper", "middle")
CARRY = 0.5
"""What is tried at the most promising budget, one at a time."""

_AGAIN, _EXACT = "plain again", "everything"
_AUDITED = 8


@dataclasses.dataclass(frozen=True)
class Judged:
    """One blended answer, for the risk: what it showed, and whether it was the full prefill's."""

    signals: Signals
    differs: bool


def measure(
    kvblend: KVBlend,
    asked: Sequence[Asked],
    render: Callable[[Question], list[int]],
    *,
    arms: Sequence[str] = (*BUDGETS, *ADAPTIVE),
    limits: Limits | None = None,
    first: int | None = None,
    seconds: float | None = None,
    batch: int = 16,
    facts: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> tuple[Measurement, list[Judged]]:
    """Audit the store, then ask questions in full, again in full, without their documents, and in every way.

    As many again are asked until there is a verdict, or none are left, or no time.
    The most promising way is then tried with other spans and other layers.

    Args:
        kvblend: on an idle engine that was started with ``forcing.engine_arguments()`` and heeds no verdict.
        asked: the questions, as ``prepare`` makes them.
        render: makes prompts, as for ``prepare``.
        arms: the ways of blending, as ``arms.parse_arm`` reads them.
        limits: what will be accepted.
        first: how many are asked before it is looked whether that will do; None: all.
        seconds: as many again are asked only where that takes no longer in all.
        batch: questions whose documents are stored at a time.
        facts: machine, versions, command; JSON-able.
        progress: show a progress bar.

    Raises:
        StoreError: the documents can't be stored.
        EngineUnavailable: the engine does not force tokens, or died.
    """
    ways = [parse_arm(name, kvblend.config) for name in arms]
    documents = [document for each in asked[:first] for document in each.question.documents]
    deviation = audit(kvblend, documents)
    fixed = [Arm(PLAIN, {"blend": False}), Arm(_AGAIN, {"blend": False}), Arm(_EXACT, {"selector": "everything"})]
    limits, rounds = limits or Limits(), _rounds(asked, first)
    observed: Observations = {}
    blind: list[Observation] = []
    begun = time.monotonic()
    done: list[Asked] = []
    for some in rounds:
        done += some
        _extend(observed, observe(kvblend, some, [*fixed, *ways], batch=batch, progress=progress))
        without = [_blind(each, render) for each in some]
        blind += observe(kvblend, without, fixed[:1], batch=batch, progress=progress)[PLAIN]
        questions = [each.question for each in done]
        plain = observed[PLAIN]
        noise, exact, lost = (
            tuple(score(*each).kl for each in zip(questions, others, plain, strict=True))
            for others in (observed[_AGAIN], observed[_EXACT], blind)
        )
        measurement = Measurement(
            identity=_identity(kvblend),
            deviation=deviation,
            noise_kl=noise,
            exact_kl=exact,
            blind_kl=lost,
            cells=tuple(_cell(arm, kvblend.config, questions, observed) for arm in ways),
            facts=dict(facts or {}),
        )
        in_all = 2 * (time.monotonic() - begun)
        if decided(measurement, limits) or (seconds is not None and in_all > seconds):
            break
    best = promising(measurement, limits)
    varied = [] if best is None else _variations(best)
    observed |= observe(kvblend, done, varied, batch=batch, progress=progress) if varied else {}
    tried = tuple(_cell(arm, kvblend.config, questions, observed) for arm in varied)
    return dataclasses.replace(measurement, variations=tried), _judged(ways, kvblend.config, questions, observed)


def _rounds(asked: Sequence[Asked], first: int | None) -> Iterator[Sequence[Asked]]:
    """The questions: some first, then again as many as there were; at least one round, be it of none."""
    start, stop = 0, first or len(asked)
    while True:
        yield asked[start:stop]
        if stop >= len(asked):
            return
        start, stop = stop, 2 * stop


def _extend(observed: Observations, more: Observations) -> None:
    for name, seen in more.items():
        observed.setdefault(name, []).extend(seen)


def audit(kvblend: KVBlend, documents: Sequence[str | TokenIds]) -> Deviation:
    """The largest deviation of stored KV, over some chunks of the documents and all layers and ranks.

    The documents are ingested, without companions, and released. The engine must be idle.
    """
    chunks = _sample(kvblend, documents)
    engine, holder = kvblend.engine, "quality/audit"
    texts = [tokens for _, tokens in chunks]
    kvblend.ingest(texts, document_ids=[holder] * len(chunks), progress=False, alone=True)
    try:
        return compare(kvblend, chunks)
    finally:
        engine.run(engine.reset_prefix_cache())
        kvblend.release([holder])


def compare(kvblend: KVBlend, chunks: Sequence[tuple[str, TokenIds]]) -> Deviation:
    """As ``audit``, of chunks that are stored already, by key and token ids."""
    engine = kvblend.engine
    worst, noise, moved, where = 0.0, 0.0, 0.0, "nothing"
    for key, tokens in chunks:
        engine.run(engine.reset_prefix_cache())
        for rank in engine.run(engine.call("audit", key, tokens.tolist())):
            if "fault" in rank:
                return Deviation(error=float("inf"), noise=noise, where=rank["fault"], chunks=len(chunks))
            noise = max(noise, *(half for layer in rank["noise"] for half in layer))
            moved = max(moved, *(half for layer in rank["moved"] for half in layer))
            for number, layer in enumerate(rank["stored"]):
                for half, error in zip(("keys", "values"), layer, strict=True):
                    if not error <= worst:  # also what is not a number
                        worst, where = error, f"the {half} of layer {number}, chunk {key}"
    return Deviation(error=worst, noise=noise, moved=moved, where=where, chunks=len(chunks))


def _sample(kvblend: KVBlend, documents: Sequence[str | TokenIds]) -> list[tuple[str, TokenIds]]:
    found: dict[str, TokenIds] = {}
    for document in documents:
        try:
            found |= dict(kvblend.cut(document))
        except ChunkRejected:
            continue
    step = max(len(found) // _AUDITED, 1)
    return list(found.items())[::step][:_AUDITED]


def _blind(asked: Asked, render: Callable[[Question], list[int]]) -> Asked:
    question = dataclasses.replace(asked.question, documents=(), supporting=())
    return Asked(question, render(question), asked.gold)


def _identity(kvblend: KVBlend) -> Identity:
    info = kvblend.engine.info
    return Identity(
        model=Path(info.model).name,
        fingerprint=info.fingerprint,
        dtype=info.dtype,
        context=kvblend.config.ingest_context,
        context_digest=namespace(model_of(info.fingerprint), info.context),
    )


def _variations(best: Cell) -> list[Arm]:
    """The same way with another span, carried, and with other layers where it goes by the question's attention."""
    own = dict(best.settings)
    selector = get_selector(own["selector"])
    if selector.share is not None:
        return []  # nothing is chosen
    asks = Evidence.QUESTION_ATTENTION in selector.needs
    others: list[dict[str, Any]] = [{"span_size": span} for span in SPANS if span != own["span_size"]]
    others += [{"carry": CARRY}] if not own["carry"] else []
    others += [{"score_layers": layers} for layers in LAYERS if asks and layers != own["score_layers"]]
    return [Arm(f"varied {number}", as_options({**own, **each})) for number, each in enumerate(others)]


def _cell(arm: Arm, config: BlendConfig, questions: Sequence[Question], observed: Observations) -> Cell:
    own = config.for_request(arm.options)
    plain = [score(*each) for each in zip(questions, observed[PLAIN], observed[PLAIN], strict=True)]
    samples: list[Sample] = [score(*each) for each in zip(questions, observed[arm.name], observed[PLAIN], strict=True)]
    return Cell(
        settings={name: getattr(own, name) for name in SETTINGS},
        recomputed=tuple(each.recomputed for each in samples),
        kl=tuple(each.kl for each in samples),
        loss=tuple(each.nll - full.nll for each, full in zip(samples, plain, strict=True)),
        same=tuple(each.same for each in samples),
    )


def _judged(
    ways: Sequence[Arm], config: BlendConfig, questions: Sequence[Question], observed: Observations
) -> list[Judged]:
    """The blended answers of selectors that score: what a request shows without a score is not comparable.

    A larger budget that was measured besides is the second opinion.
    """
    rows = []
    for arm in ways:
        second = observed.get(_second(arm, ways, config) or "", [None] * len(questions))
        for question, own, other, plain in zip(questions, observed[arm.name], second, observed[PLAIN], strict=True):
            if own.report.blended and own.signals.uncovered_mass is not None:
                signals = own.signals
                if other is not None and own.completion is not None and other.completion is not None:
                    signals = with_second(signals, own.completion, other.completion)
                rows.append(Judged(signals, not score(question, own, plain).same))
    return rows


def _second(arm: Arm, ways: Sequence[Arm], config: BlendConfig) -> str | None:
    """The way that differs in its budget alone, which is at least twice as large, and the least of these."""
    own = config.for_request(arm.options)
    larger = {
        each.recompute_ratio: way.name
        for way in ways
        if (each := config.for_request(way.options)).recompute_ratio >= 2 * own.recompute_ratio > 0
        and each.replace(recompute_ratio=own.recompute_ratio) == own
    }
    return larger[min(larger)] if larger else None


__all__ = ["ADAPTIVE", "BUDGETS", "CARRY", "LAYERS", "SPANS", "Judged", "audit", "compare", "measure"]
