"""FakeEngine: answers by a script, streams token by token, stores and finds chunks; no model, no vLLM."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from kvblend_rag.blend.chunk import TokenIds, as_token_ids
from kvblend_rag.config import BlendConfig
from kvblend_rag.conversation import dialect
from kvblend_rag.conversation.sampling import Sampling
from kvblend_rag.conversation.turn import ChatRequest, Turn
from kvblend_rag.engine import Engine, EngineInfo, Prompt, Watched
from kvblend_rag.errors import ConfigError, EngineUnavailable, PromptTooLong
from kvblend_rag.ingest import STORING
from kvblend_rag.kvblend import KVBlend
from kvblend_rag.loop import LoopThread
from kvblend_rag.output import CompletionOutput, RequestMetrics, RequestOutput
from kvblend_rag.report import BlendReport
from kvblend_rag.testing.plain import PlainTurn
from kvblend_rag.testing.script import FakeParams, ScriptedAnswer
from kvblend_rag.testing.shelf import FakeShelf
from kvblend_rag.testing.tokenizer import WordTokenizer

T = TypeVar("T")
Answers = "str | Sequence[str | Exception] | Callable[[FakeRequest], str | Exception]"


@dataclass(frozen=True, kw_only=True)
class FakeRequest:
    """A request as the engine saw it."""

    request_id: str
    prompt: str
    """As text, special tokens included."""
    prompt_token_ids: tuple[int, ...]
    params: FakeParams
    """``params.settings`` is what was asked for; ``params.structured_outputs`` what vLLM's parsers made of it."""
    options: dict[str, Any] = field(default_factory=dict)
    report: BlendReport = field(default_factory=BlendReport)
    """What is reused of the prompt."""


class FakeEngine(Engine):
    """An engine without a model.

    Args:
        answers: raw generated texts, tool-call syntax included, one a request (``n`` of them for ``n`` answers),
            the last one repeated; or a function of the request. An exception is raised instead.
        tokenizer: with the interface of Transformers.
        store_path: a store's folder; with one, chunks are ingested (their token ids, no KV) and found in prompts.
        max_model_len: context, in tokens.
        parsers: ``plain`` reads Hermes calls by itself, ``vllm`` through vLLM's own parsers.
        delay: seconds between two tokens.
        model: the model's name.
        architectures: as the model's configuration names them; they choose parsers.
        refusal: why this model can't be blended.
        logprob: of each token of a blended answer, in nats; those of an ordinary prefill have half of it.

    Attributes:
        requests: every request but those that ingest.
        aborted: ids of the requests whose iteration was left early.
        calls: every maintenance call: its name and arguments.
        ingested: number of chunks computed.
        peak: most requests in flight at once.
    """

    def __init__(
        self,
        answers: Any = "Answer.",
        *,
        tokenizer: Any = None,
        store_path: str | Path | None = None,
        max_model_len: int = 4096,
        parsers: Literal["plain", "vllm"] = "plain",
        delay: float = 0.0,
        model: str = "fake-model",
        architectures: tuple[str, ...] = (),
        refusal: str | None = None,
        logprob: float = -0.5,
    ) -> None:
        self._tokenizer = tokenizer or WordTokenizer()
        self._answers = answers if callable(answers) else _Script(answers)
        self._parsers, self._delay, self._logprob = parsers, delay, logprob
        self.info = EngineInfo(
            model=model,
            max_model_len=max_model_len,
            dtype="float32",
            device="none",
            version="FakeEngine",
            fingerprint=f"fake:{model}",
            context=(),
            refusal=refusal,
            architectures=architectures,
        )
        self._shelf = FakeShelf(store_path, self.info)
        self._loop = LoopThread()
        self._running = 0
        self._made = 0
        self.requests: list[FakeRequest] = []
        self.aborted: list[str] = []
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.ingested = 0
        self.peak = 0
        self.closed = False

    @property
    def tokenizer(self) -> Any:
        """See :meth:`Engine.tokenizer`."""
        return self._tokenizer

    def sampling(self, settings: Sampling, *, stream: bool = False) -> FakeParams:
        """See :meth:`Engine.sampling`."""
        return FakeParams(settings=settings, kind="delta" if stream else "final")

    def turn(self, request: ChatRequest, *, stream: bool = False) -> Turn:
        """See :meth:`Engine.turn`."""
        turn: Turn
        structured = None
        if self._parsers == "vllm":
            from kvblend_rag.vllm_plugin.chat_parsers import ParsedTurn

            turn = parsed = ParsedTurn(request, self.tokenizer, self.template, self.info.architectures)
            structured = parsed.structured_outputs
        else:
            reasons = bool(
                request.reasoning_parser or dialect.reasoning_parser(self.template.source, self.info.architectures)
            )
            turn = PlainTurn(request, self.template, reasons)
        turn.params = FakeParams(
            settings=request.sampling, kind="delta" if stream else "final", structured_outputs=structured
        )
        return turn

    def one_token(self) -> FakeParams:
        """See :meth:`Engine.one_token`."""
        return FakeParams(settings=Sampling(max_tokens=1), kind="final")

    def watched(self, sampling_params: FakeParams | None, *, whole: bool = False, most: int | None = None) -> Watched:
        """See :meth:`Engine.watched`."""
        params = sampling_params or FakeParams()
        settings = params.settings
        wanted = dataclasses.replace(settings, logprobs=True, top_logprobs=max(settings.top_logprobs, 2))
        if most is not None:
            wanted = dataclasses.replace(wanted, max_tokens=min(settings.max_tokens or most, most))
        keep = settings.top_logprobs if settings.logprobs or settings.top_logprobs else None
        own = dataclasses.replace(params, settings=wanted, kind="final" if whole else params.kind)
        return Watched(sampling_params=own, keep=keep, in_parts=own.kind == "delta", count=settings.n)

    def generate(
        self,
        prompt: Prompt,
        sampling_params: Any = None,
        *,
        options: dict[str, Any] | None = None,
        **extra: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """See :meth:`Engine.generate`."""
        if self.closed:
            raise EngineUnavailable("This engine was closed: make a new one.")
        return self._loop.stream(lambda: self._generate(prompt, sampling_params or FakeParams(), dict(options or {})))

    async def call(self, method: str, *arguments: Any) -> list[Any]:
        """See :meth:`Engine.call`: ``flush``, ``prefetch`` and ``forget`` do their work on the catalogue."""
        self.calls.append((method, arguments))
        if method == "report":
            reports = {each.request_id: each.report.to_dict() for each in self.requests}
            return [reports.get(arguments[0])]
        return [self._shelf.call(method, *arguments)]

    async def reset_prefix_cache(self) -> bool:
        """See :meth:`Engine.reset_prefix_cache`."""
        self._shelf.forget_prompts()
        return True

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """See :meth:`Engine.run`."""
        return self._loop.run(work)

    def close(self) -> None:
        """See :meth:`Engine.close`."""
        if not self.closed:
            self.closed = True
            self._loop.stop()
            self._shelf.close()

    async def _generate(
        self, prompt: Prompt, params: FakeParams, options: dict[str, Any]
    ) -> AsyncIterator[RequestOutput]:
        tokens = self._tokens(prompt)
        if len(tokens) >= self.info.max_model_len:
            raise PromptTooLong(
                f"The prompt of {len(tokens)} tokens does not fit into the model's context of "
                f"{self.info.max_model_len} tokens."
            )
        self._made += 1
        request_id = f"fake-{self._made}"
        if "ingest" in options:
            self.ingested += 1
            self._shelf.keep(tokens, options["ingest"])
            report = BlendReport(request_id=request_id, prompt_tokens=len(tokens), reason=STORING)
            yield RequestOutput(
                request_id=request_id,
                prompt=None,
                prompt_token_ids=tokens.tolist(),
                outputs=[CompletionOutput(index=0, text="", token_ids=(0,), finish_reason="length")],
                finished=True,
                report=report,
            )
            return
        request = FakeRequest(
            request_id=request_id,
            prompt=self.tokenizer.decode(tokens.tolist()),
            prompt_token_ids=tuple(tokens.tolist()),
            params=params,
            options=options,
            report=self._shelf.report(request_id, tokens, options),
        )
        self.requests.append(request)
        room = self.info.max_model_len - len(tokens)
        logprob = self._logprob if request.report.blended else self._logprob / 2
        answers = [self._answer(request, room, logprob) for _ in range(params.settings.n)]
        self._running += 1
        self.peak = max(self.peak, self._running)
        finished = False
        try:
            async for output in self._outputs(request, answers):
                finished = output.finished
                yield output
        finally:
            self._running -= 1
            if not finished:
                self.aborted.append(request_id)

    def _tokens(self, prompt: Prompt) -> TokenIds:
        if isinstance(prompt, dict):
            prompt = prompt.get("prompt_token_ids") or prompt["prompt"]
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt)
        return as_token_ids(prompt)  # type: ignore[arg-type]

    def _answer(self, request: FakeRequest, room: int, logprob: float) -> ScriptedAnswer:
        given = self._answers(request)
        if isinstance(given, Exception):
            raise given
        cut = ScriptedAnswer.cut(str(given), self.tokenizer, request.params.settings, room)
        return dataclasses.replace(cut, logprob=logprob)

    async def _outputs(self, request: FakeRequest, answers: Sequence[ScriptedAnswer]) -> AsyncIterator[RequestOutput]:
        started = time.time()
        first = None
        longest = max(max(len(answer.pieces) for answer in answers), 1)
        for step in range(longest):
            await asyncio.sleep(self._delay)
            first = first or time.time()
            last = step == longest - 1
            outputs = [
                output
                for index, answer in enumerate(answers)
                if (output := answer.output(index, step, request.params)) is not None
            ]
            if request.params.kind == "final" and not last:
                continue
            yield RequestOutput(
                request_id=request.request_id,
                prompt=request.prompt,
                prompt_token_ids=list(request.prompt_token_ids),
                outputs=outputs,
                finished=last,
                metrics=RequestMetrics(first_scheduled_time=started, first_token_time=first, finished_time=time.time()),
                report=request.report if last else BlendReport(request_id=request.request_id),
            )


class _Script:
    def __init__(self, answers: str | Sequence[str | Exception]) -> None:
        self._left = [answers] if isinstance(answers, str) else list(answers)
        if not self._left:
            raise ConfigError("A FakeEngine needs at least one answer.")

    def __call__(self, request: FakeRequest) -> str | Exception:
        return self._left.pop(0) if len(self._left) > 1 else self._left[0]


def fake_kvblend(
    answers: Any = "Answer.", *, store_path: str | Path, config: Mapping[str, Any] | None = None, **options: Any
) -> KVBlend:
    """A ``KVBlend`` over a ``FakeEngine`` with a store.

    Args:
        answers: as for ``FakeEngine``.
        store_path: the store's folder.
        config: further settings of ``BlendConfig``.
        options: further arguments of ``FakeEngine``.
    """
    engine = FakeEngine(answers, store_path=store_path, **options)
    return KVBlend(BlendConfig(model=engine.info.model, store_path=str(store_path), **dict(config or {})), engine)


__all__ = ["FakeEngine", "FakeRequest", "fake_kvblend"]
