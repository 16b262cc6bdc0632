"""Guard: holds a blended answer back until its risk is known, and has a risky one computed in full instead."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from kvblend_rag.calibration.risk import RiskModel, Signals, margin
from kvblend_rag.config import BlendConfig
from kvblend_rag.engine import Engine, Prompt
from kvblend_rag.output import CompletionOutput, RequestOutput, last
from kvblend_rag.second_opinion import BEGINNING, beginning, second_options, with_second


class Guard:
    """Judges the requests of one engine.

    Before anything is shown, the risk is compared with ``max_risk``: of the whole answer, or where tokens are streamed
    of what the first ones tell. A whole answer is asked for a second time (``second_opinion``), and of a stream as much
    as is held back for it (``second_opinion_streams``), unless the judgement would be the same whatever came of it.

    Args:
        engine: answers.
        model: from signals to risk.
    """

    def __init__(self, engine: Engine, model: RiskModel) -> None:
        self._engine, self._model = engine, model

    async def stream(
        self,
        prompt: Prompt,
        sampling_params: Any,
        options: Mapping[str, Any],
        own: BlendConfig,
        *,
        whole: bool = False,
        **extra: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one request; each report tells the risk as it was known then.

        Args:
            prompt: what is answered.
            sampling_params: the engine's.
            options: the request's blending options.
            own: the request's settings: ``max_risk``, ``on_risk``, ``second_opinion``, ``second_opinion_streams``.
            whole: nobody looks before the end, so the whole answer is judged, whatever the parameters say.
            extra: passed on to the engine.
        """
        watched = self._engine.watched(sampling_params, whole=whole)
        second = second_options(options, own) if watched.count == 1 else None
        watch, judged, risk, risky = _Watch(watched.in_parts), False, None, None
        held_until = 0.0
        held: list[RequestOutput] = []
        blending = self._engine.generate(prompt, watched.sampling_params, options=dict(options), **extra)
        async with aclosing(blending) as outputs:
            async for output in outputs:
                watch.see(output)
                if not judged or output.finished:
                    if not held or output.finished:
                        blended, watch.known = await self._account(output)
                    signals = watch.signals(output.finished)
                    askable = blended and not judged and (output.finished or own.second_opinion_streams)
                    if second and askable and self._open(signals, own.max_risk):
                        if not output.finished and len(watch.answer.token_ids) < BEGINNING:
                            held.append(output)
                            continue
                        first, most = (watch.answer, None) if output.finished else (beginning(watch.answer), BEGINNING)
                        again = self._engine.watched(sampling_params, whole=True, most=most).sampling_params
                        other = await last(self._engine.generate(prompt, again, options=second, **extra))
                        signals = with_second(signals, first, other.outputs[0])
                        held_until = time.time()
                    risk = self._model.risk(signals) if blended else None
                if risk is not None and risk > own.max_risk and not judged and own.on_risk == "prefill":
                    risky = output
                    break
                judged = watch.begun
                for each in (*held, output):
                    yield _shown(each.with_logprobs(watched.keep), risk, own.max_risk, held_until)
                held.clear()
        if risky is None:
            return
        ordinary = self._engine.generate(prompt, sampling_params, options={**options, "blend": False}, **extra)
        async with aclosing(ordinary) as outputs:
            async for output in outputs:
                yield _instead(output, risky, risk, own.max_risk)

    def _open(self, signals: Signals, limit: float) -> bool:
        """Whether a second opinion may turn the judgement."""
        said = (dataclasses.replace(signals, disputed=each, disputed_early=each) for each in (0.0, 1.0))
        low, high = map(self._model.risk, said)
        return low <= limit < high

    async def _account(self, output: RequestOutput) -> tuple[bool, Signals]:
        """Whether the request runs on blended KV, and what that shows."""
        if output.finished and output.report.blended:
            return True, Signals.before_the_answer(output.report)
        known = next((each for each in await self._engine.call("account", output.request_id) if each), None)
        if known is None:
            return False, Signals()
        return True, Signals(uncovered_mass=known["uncovered"], moved_mass=known["moved"])


class _Watch:
    """The signals of a request as its outputs come: cumulative, new parts or one whole.

    Args:
        in_parts: outputs are new parts.
    """

    answer: CompletionOutput
    """The first answer, of which of new parts no more is kept than a second opinion looks at."""
    begun: bool
    """There is a token."""

    def __init__(self, in_parts: bool) -> None:
        self.known = Signals()
        self.begun = False
        self._in_parts = in_parts
        self._margin: float | None = None
        self._lowest: float | None = None

    def see(self, output: RequestOutput) -> None:
        for completion in output.outputs:
            for token, choices in zip(completion.token_ids, completion.logprobs or (), strict=False):
                if self._margin is None:
                    self._margin = margin(choices)
                own = float(choices[token].logprob)
                self._lowest = own if self._lowest is None else min(self._lowest, own)
        answer = output.outputs[0]
        if self._in_parts and self.begun:
            if len(self.answer.token_ids) >= BEGINNING:
                return
            steps = [*(self.answer.logprobs or ()), *(answer.logprobs or ())]
            answer = dataclasses.replace(answer, token_ids=(*self.answer.token_ids, *answer.token_ids), logprobs=steps)
        self.answer, self.begun = answer, self.begun or bool(answer.token_ids)

    def signals(self, finished: bool) -> Signals:
        return dataclasses.replace(
            self.known, first_margin=self._margin, lowest_logprob=self._lowest if finished else None
        )


def _shown(output: RequestOutput, risk: float | None, limit: float, held_until: float) -> RequestOutput:
    """A blended output; its times are those of whoever waits, to whom nothing was shown before."""
    report = dataclasses.replace(output.report, risk=risk)
    if output.finished and risk is not None and risk > limit:
        reason = f"the risk of this answer, {risk:.2f}, is above max_risk ({limit:g})"
        report = dataclasses.replace(report, reason=reason)
    metrics = output.metrics
    if metrics is not None:
        first, finished = (max(each, held_until) for each in (metrics.first_token_time, metrics.finished_time))
        metrics = dataclasses.replace(metrics, first_token_time=first, finished_time=finished)
    return dataclasses.replace(output, report=report, metrics=metrics)


def _instead(output: RequestOutput, blended: RequestOutput, risk: float | None, limit: float) -> RequestOutput:
    """An ordinary prefill's output; its times count from the first attempt."""
    report = dataclasses.replace(
        output.report,
        risk=risk,
        reason=f"the risk of the blended answer, {risk:.2f}, was above max_risk ({limit:g}): everything was computed",
    )
    metrics = output.metrics
    if metrics is not None and blended.metrics is not None:
        started = blended.metrics.first_scheduled_time
        metrics = dataclasses.replace(metrics, first_scheduled_time=started)
    return dataclasses.replace(output, report=report, metrics=metrics)


__all__ = ["Guard"]
