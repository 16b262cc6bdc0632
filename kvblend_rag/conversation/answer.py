"""AnswerReader: an engine's outputs of one request become deltas or a finished result."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from kvblend_rag.conversation.turn import (
    ChatDelta,
    ChatResult,
    Generation,
    Parsed,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Turn,
    Usage,
)
from kvblend_rag.output import CompletionOutput, RequestOutput


@dataclass
class _Answer:
    """What is known of one of the answers."""

    raw: str = ""
    text: str = ""
    plain: bool = True
    """Whether all of it was text so far."""
    calls: set[int] = field(default_factory=set)
    token_ids: list[int] = field(default_factory=list)
    done: bool = False


class AnswerReader:
    """Reads one request's outputs.

    Args:
        turn: takes generated text apart; None where all of it is text.
        tokenizer: names tokens whose text the engine left out.
        several_calls: False: only the first tool call of an answer counts.
    """

    def __init__(self, turn: Turn | None, tokenizer: Any, several_calls: bool = True) -> None:
        self._turn, self._tokenizer, self._several_calls = turn, tokenizer, several_calls
        self._answers: dict[int, _Answer] = {}

    def deltas(self, output: RequestOutput) -> Iterator[ChatDelta]:
        """What an output, which holds only what is new, adds; the very last carries usage and report."""
        deltas = [self._delta(each) for each in output.outputs]
        if output.finished:
            last = deltas.pop() if deltas else ChatDelta()
            deltas.append(
                dataclasses.replace(
                    last,
                    usage=self._usage(output, sum(len(answer.token_ids) for answer in self._answers.values())),
                    report=output.report,
                    prompt_token_ids=tuple(output.prompt_token_ids),
                    warnings=self._turn.warnings if self._turn else (),
                )
            )
        for delta in deltas:
            if delta != ChatDelta(index=delta.index):
                yield delta

    def result(self, output: RequestOutput) -> ChatResult:
        """The finished, whole output's result."""
        return ChatResult(
            generations=tuple(self._generation(each) for each in sorted(output.outputs, key=lambda each: each.index)),
            usage=self._usage(output, sum(len(each.token_ids) for each in output.outputs)),
            report=output.report,
            prompt_token_ids=tuple(output.prompt_token_ids),
            ttft=output.metrics.ttft if output.metrics else None,
            warnings=self._turn.warnings if self._turn else (),
        )

    def _delta(self, new: CompletionOutput) -> ChatDelta:
        answer = self._answers.setdefault(new.index, _Answer())
        if answer.done:  # vLLM repeats the last output of an answer that ends before its siblings
            return ChatDelta(index=new.index)
        answer.done = new.finish_reason is not None
        answer.token_ids += new.token_ids
        answer.raw += new.text
        parsed = Parsed(text=new.text)
        if self._turn is not None:
            parsed = self._turn.delta(new.index, new.text, new.token_ids, answer.done)
        answer.plain = answer.plain and not (parsed.reasoning or parsed.tool_calls)
        answer.text += parsed.text
        text, found = parsed.text, parsed.tool_calls
        if answer.done and answer.plain:
            rest, found = self._rest(answer)
            text += rest
        calls = tuple(self._identified(call, answer.calls) for call in self._allowed(found))
        return ChatDelta(
            index=new.index,
            text=text,
            reasoning=parsed.reasoning,
            tool_calls=calls,
            logprobs=tuple(self._logprobs(new) or ()),
            finish_reason=_reason(new.finish_reason, bool(answer.calls)) if answer.done else None,
        )

    def _rest(self, answer: _Answer) -> tuple[str, tuple[ToolCallDelta, ...]]:
        """What a parser did not let go of: text that could have become a call, or calls it can't stream."""
        whole = Parsed(text=answer.raw)
        if self._turn is not None:
            whole = self._turn.whole(answer.raw, answer.token_ids)
        due = whole.text if whole.tool_calls or whole.reasoning else answer.raw
        return due[len(answer.text) :] if due.startswith(answer.text) else "", whole.tool_calls

    def _generation(self, whole: CompletionOutput) -> Generation:
        parsed = Parsed(text=whole.text)
        if self._turn is not None:
            parsed = self._turn.whole(whole.text, whole.token_ids)
        seen: set[int] = set()
        calls = tuple(self._identified(call, seen) for call in self._allowed(parsed.tool_calls))
        text = parsed.text
        if not calls and not parsed.reasoning and whole.text.startswith(text):
            text = whole.text
        logprobs = self._logprobs(whole)
        return Generation(
            text=text,
            tool_calls=tuple(
                ToolCall(id=call.id or "", name=call.name or "", arguments=call.arguments or "{}") for call in calls
            ),
            reasoning=parsed.reasoning,
            finish_reason=_reason(whole.finish_reason, bool(calls)),
            logprobs=None if logprobs is None else tuple(logprobs),
        )

    def _allowed(self, calls: tuple[ToolCallDelta, ...]) -> tuple[ToolCallDelta, ...]:
        return calls if self._several_calls else tuple(call for call in calls if call.index == 0)

    def _identified(self, call: ToolCallDelta, seen: set[int]) -> ToolCallDelta:
        first = call.index not in seen
        seen.add(call.index)
        return dataclasses.replace(call, id=call.id or f"call_{uuid.uuid4().hex[:24]}") if first else call

    def _logprobs(self, output: CompletionOutput) -> list[TokenLogprob] | None:
        if output.logprobs is None:
            return None
        found = []
        for token_id, choices in zip(output.token_ids, output.logprobs, strict=False):
            ranked = sorted(choices.items(), key=lambda item: -item[1].logprob)
            found.append(
                TokenLogprob(
                    token=self._text(token_id, choices[token_id]),
                    token_id=token_id,
                    logprob=float(choices[token_id].logprob),
                    top=tuple((self._text(each, choice), float(choice.logprob)) for each, choice in ranked),
                )
            )
        return found

    def _text(self, token_id: int, choice: Any) -> str:
        text = choice.decoded_token
        return str(text if text is not None else self._tokenizer.decode([token_id]))

    @staticmethod
    def _usage(output: RequestOutput, output_tokens: int) -> Usage:
        return Usage(
            input_tokens=len(output.prompt_token_ids),
            output_tokens=output_tokens,
            cache_read=output.report.cached_tokens + output.report.reused_tokens,
        )


def _reason(reason: str | None, called: bool) -> str:
    return "tool_calls" if called and reason in (None, "stop") else reason or "stop"


__all__ = ["AnswerReader"]
