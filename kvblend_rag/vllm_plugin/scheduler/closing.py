"""ClosingDesk: what becomes of the reports of requests that have ended, on the scheduler's side.

They are counted, logged, traced, and handed to the workers, which the front end can ask for them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.request import Request

from kvblend_rag.blend.cause import cause_of
from kvblend_rag.ingest import STORING
from kvblend_rag.report import BlendReport

logger = logging.getLogger(__name__)

_FAULTS = frozenset({"damaged", "missing", "unreachable", "rank", "options", "other"})
"""Causes that somebody should look into."""

_SPAN = "kvblend"
_BETWEEN_WARNINGS_S = 1.0


class ClosingDesk:
    """Takes in what has ended, and gives it out at the next step, when the workers' account is complete.

    Args:
        vllm_config: whether requests are traced.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        observability = getattr(vllm_config, "observability_config", None)
        self._traced = bool(getattr(observability, "otlp_traces_endpoint", None))
        self._ended: list[tuple[dict[str, Any], float, Mapping[str, str] | None, float]] = []
        self._warned = float("-inf")
        self._unsaid = 0

    def end(self, request: Request, answer: dict[str, Any]) -> None:
        """A request has ended; ``answer`` is its report as a dictionary, which may yet be completed in place."""
        self._ended.append((answer, request.arrival_time, request.trace_headers, time.time()))

    def take(self) -> list[dict[str, Any]]:
        """The reports of what ended since the last call; each is logged and traced now."""
        ended, self._ended = self._ended, []
        for answer, arrived, headers, left in ended:
            report = BlendReport.from_dict(answer)
            if report.reason != STORING:
                self._log(report)
                if self._traced:
                    _trace(report, arrived, headers, left)
        return [answer for answer, *_ in ended]

    def _log(self, report: BlendReport) -> None:
        logger.debug("kvblend: request %s: %s.", report.request_id, report)
        if report.reason is None or cause_of(report.reason) not in _FAULTS:
            return
        if time.monotonic() - self._warned < _BETWEEN_WARNINGS_S:  # a store that is down meets every request
            self._unsaid += 1
            return
        others = f" ({self._unsaid} more like it since the last such line)" if self._unsaid else ""
        self._warned, self._unsaid = time.monotonic(), 0
        logger.warning("kvblend: request %s was computed in full: %s%s", report.request_id, report.reason, others)


def _trace(report: BlendReport, arrived: float, headers: Mapping[str, str] | None, left: float) -> None:
    """A span of the request's whole time, in the caller's trace if it sent one."""
    from vllm.tracing import extract_trace_context, instrument_manual  # OpenTelemetry may be missing

    attributes: dict[str, Any] = {
        "gen_ai.request.id": report.request_id,
        "kvblend.blended": report.blended,
        "kvblend.selector": report.selector,
        "kvblend.chunks": len(report.chunks),
        **{
            f"kvblend.tokens.{group}": getattr(report, f"{group}_tokens")
            for group in ("prompt", "cached", "reused", "recomputed", "computed", "scored")
        },
        **{f"kvblend.milliseconds.{step}": spent for step, spent in report.milliseconds.items()},
        **{f"kvblend.bytes.{load.tier}": load.bytes for load in report.loads},
    }
    if report.reason is not None:
        attributes |= {"kvblend.reason": report.reason, "kvblend.cause": cause_of(report.reason)}
    instrument_manual(
        _SPAN,
        start_time=int(arrived * 1e9),
        end_time=int(left * 1e9),
        attributes=attributes,
        context=extract_trace_context(headers),
    )


__all__ = ["ClosingDesk"]
