"""What the server answers, as our outputs; of chat and of completions, whole and in parts."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvblend_rag.conversation.turn import Parsed, ToolCallDelta
from kvblend_rag.output import CompletionOutput, RequestMetrics, RequestOutput
from kvblend_rag.report import BlendReport


@dataclass(frozen=True)
class ServedLogprob:
    """A choice of a token, with the names that vLLM gives."""

    logprob: float
    decoded_token: str
    rank: int


@dataclass
class Reading:
    """One request's answer as it comes.

    Attributes:
        request_id: of the answer.
        prompt_token_ids: of the first answer that told them.
    """

    chat: bool
    submitted: float = field(default_factory=time.time)
    first: float | None = None
    request_id: str = ""
    prompt_token_ids: list[int] = field(default_factory=list)

    def output(self, answer: Any, *, whole: bool) -> tuple[RequestOutput, list[Parsed]]:
        """An answer, or a part of one, and what the server has taken apart of each choice."""
        data = answer.model_dump()
        self.request_id = data.get("id") or self.request_id
        self.prompt_token_ids = self.prompt_token_ids or _prompt(data)
        choices = sorted(data.get("choices") or (), key=lambda each: each["index"])
        if choices and self.first is None:
            self.first = time.time()
        outputs, parsed = [], []
        for choice in choices:
            said = (choice.get("message") or choice.get("delta") or {}) if self.chat else {"content": choice["text"]}
            text = said.get("content") or ""
            outputs.append(
                CompletionOutput(
                    index=choice["index"],
                    text=text,
                    token_ids=tuple(choice.get("token_ids") or ()),
                    logprobs=_logprobs(choice, self.chat),
                    finish_reason=_ended(choice.get("finish_reason")),
                    stop_reason=choice.get("stop_reason"),
                )
            )
            reasoning = said.get("reasoning") or said.get("reasoning_content") or ""
            parsed.append(Parsed(text=text, reasoning=reasoning, tool_calls=_calls(said.get("tool_calls") or ())))
        report = (data.get("kv_transfer_params") or {}).get("kvblend") if whole else None
        return self._made(outputs, report, finished=whole), parsed

    def last(self, report: Mapping[str, Any] | None) -> RequestOutput:
        """The end of a stream, with the report that was asked for behind it."""
        return self._made([], report, finished=True)

    def _made(
        self, outputs: list[CompletionOutput], report: Mapping[str, Any] | None, *, finished: bool
    ) -> RequestOutput:
        now = time.time()
        return RequestOutput(
            request_id=self.request_id,
            prompt=None,
            prompt_token_ids=self.prompt_token_ids,
            outputs=outputs,
            finished=finished,
            metrics=RequestMetrics(
                first_scheduled_time=self.submitted, first_token_time=self.first or now, finished_time=now
            ),
            report=BlendReport.from_dict(dict(report)) if report else BlendReport(request_id=self.request_id),
        )


def _prompt(data: Mapping[str, Any]) -> list[int]:
    """A chat answer has them at the top, a completion in its first choice."""
    found = data.get("prompt_token_ids")
    if found is None and data.get("choices"):
        found = data["choices"][0].get("prompt_token_ids")
    return list(found or ())


def _ended(reason: str | None) -> str | None:
    return "stop" if reason == "tool_calls" else reason  # the reader of answers tells calls by itself


def _calls(calls: Iterable[Mapping[str, Any]]) -> tuple[ToolCallDelta, ...]:
    made = []
    for place, call in enumerate(calls):
        function = call.get("function") or {}
        made.append(
            ToolCallDelta(
                index=call.get("index") if call.get("index") is not None else place,  # type: ignore[arg-type]
                id=call.get("id"),
                name=function.get("name"),
                arguments=function.get("arguments") or "",
            )
        )
    return tuple(made)


def _logprobs(choice: Mapping[str, Any], chat: bool) -> list[dict[int, ServedLogprob]] | None:
    """By step, as vLLM gives them; alternatives are told as texts, and are numbered from −1 down."""
    given = choice.get("logprobs")
    ids = choice.get("token_ids") or ()
    if not given:
        return None
    if chat:
        steps = [
            (each["token"], each["logprob"], [(top["token"], top["logprob"]) for top in each["top_logprobs"]])
            for each in given.get("content") or ()
        ]
    else:
        tops = given.get("top_logprobs") or [None] * len(given["tokens"])
        steps = [
            (token, logprob, list((top or {}).items()))
            for token, logprob, top in zip(given["tokens"], given["token_logprobs"], tops, strict=True)
        ]
    found = []
    for token_id, (token, logprob, alternatives) in zip(ids, steps, strict=False):
        ranked = sorted(alternatives, key=lambda each: -each[1])
        others = [each for each in ranked if each[0] != token]
        own = next((rank for rank, each in enumerate(ranked, 1) if each[0] == token), len(ranked) + 1)
        step = {token_id: ServedLogprob(logprob, token, own)}
        step |= {
            -place: ServedLogprob(value, text, place if place < own else place + 1)
            for place, (text, value) in enumerate(others, 1)
        }
        found.append(step)
    return found


__all__ = ["Reading", "ServedLogprob"]
