"""Guard: holds a blended answer back until its risk is known, and has a risky one computed in full instead."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from kvblend_rag.calibration.risk import RiskModel, Signals, margin
from kvblend_rag.config import BlendConfig
from kvblend_rag.engine import Engine, Prompt
from kvblend_rag.output import RequestOutput, last
from kvblend_rag.report import BlendReport
from kvblend_rag.second_opinion import disputed, second_options


class Guard:
    """Judges the requests of one engine.

    Before anything is shown, the risk of what is known by then is compared with ``max_risk``: the uncovered
    score and the margin of the first token while tokens are streamed, the whole answer otherwise. That is asked
    for a second time (``second_opinion``), unless the judgement would be the same whatever came of it.

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
            own: the request's settings: ``max_risk``, ``on_risk``, ``second_opinion``.
            whole: nobody looks before the end, so the whole answer is judged, whatever the parameters say.
            extra: passed on to the engine.
        """
        second = second_options(options, own)
        watched, logprobs = self._engine.watched(sampling_params, whole=whole)
        watch, risky = _Watch(), None
        async with aclosing(self._engine.generate(prompt, watched, options=dict(options), **extra)) as outputs:
            async for output in outputs:
                begun = watch.seen
                watch.see(output)
                if not begun or output.finished:
                    blended, watch.known = await self._account(output)
                    signals = watch.signals(output.finished)
                    waited_for = output.finished and not begun and len(output.outputs) == 1
                    if blended and waited_for and second and self._open(signals, own.max_risk):
                        again = await last(self._engine.generate(prompt, watched, options=second, **extra))
                        signals = dataclasses.replace(signals, disputed=disputed(output.outputs[0], again.outputs[0]))
                    risk = self._model.risk(signals) if blended else None
                if risk is not None and risk > own.max_risk and not begun and own.on_risk == "prefill":
                    risky = output
                    break
                report = output.report
                if output.finished and risk is not None:
                    report = _marked(report, risk, own.max_risk)
                yield dataclasses.replace(output.with_logprobs(logprobs), report=dataclasses.replace(report, risk=risk))
        if risky is None:
            return
        ordinary = self._engine.generate(prompt, sampling_params, options={**options, "blend": False}, **extra)
        async with aclosing(ordinary) as outputs:
            async for output in outputs:
                yield _instead(output, risky, risk, own.max_risk)

    def _open(self, signals: Signals, limit: float) -> bool:
        """Whether a second opinion may turn the judgement."""
        low, high = (self._model.risk(dataclasses.replace(signals, disputed=each)) for each in (0.0, 1.0))
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
    """The signals of a request as its outputs come: cumulative, new parts or one whole."""

    def __init__(self) -> None:
        self.seen = False
        self.known = Signals()
        self._margin: float | None = None
        self._lowest: float | None = None

    def see(self, output: RequestOutput) -> None:
        for completion in output.outputs:
            for token, choices in zip(completion.token_ids, completion.logprobs or (), strict=False):
                if not self.seen:
                    self._margin = margin(choices)
                    self.seen = True
                own = float(choices[token].logprob)
                self._lowest = own if self._lowest is None else min(self._lowest, own)
            self.seen = self.seen or bool(completion.token_ids)

    def signals(self, finished: bool) -> Signals:
        return dataclasses.replace(
            self.known, first_margin=self._margin, lowest_logprob=self._lowest if finished else None
        )


def _marked(report: BlendReport, risk: float, limit: float) -> BlendReport:
    if risk <= limit:
        return report
    return dataclasses.replace(report, reason=f"the risk of this answer, {risk:.2f}, is above max_risk ({limit:g})")


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
