"""VLLMEngine: one vLLM ``AsyncLLM`` on a background loop, behind the Engine protocol."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any, TypeVar

from kvblend_rag.vllm_plugin import expected  # noqa: F401  first, since it says what others would trip over

# isort: split
import numpy as np
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from kvblend_rag.config import BlendConfig
from kvblend_rag.conversation.sampling import Sampling
from kvblend_rag.conversation.turn import ChatRequest, Turn
from kvblend_rag.engine import Engine, EngineInfo, Prompt, Watched
from kvblend_rag.errors import ConfigError, EngineUnavailable, KVBlendError, PromptTooLong
from kvblend_rag.loop import LoopThread
from kvblend_rag.output import CompletionOutput, RequestMetrics, RequestOutput
from kvblend_rag.report import BlendReport
from kvblend_rag.vllm_plugin import compat
from kvblend_rag.vllm_plugin.chat_parsers import ParsedTurn, form
from kvblend_rag.vllm_plugin.launch import connector_arguments, root_cause, start
from kvblend_rag.vllm_plugin.request import PARAMETER
from kvblend_rag.vllm_plugin.sampling import sampling_params

T = TypeVar("T")

_BESIDE_ANSWERS = 8
"""Chunks in a server's hands at a time: an answer that comes then waits behind no more than these."""


class VLLMEngine(Engine):
    """vLLM with our connector.

    Use :meth:`launch` to start one, :meth:`adopt` for one that runs already.
    """

    def __init__(
        self, llm: AsyncLLM, loop: LoopThread, *, owned: bool, described: list[dict[str, Any]] | None = None
    ) -> None:
        self._llm, self._loop, self._owned = llm, loop, owned
        self._ids = itertools.count()
        self._defaults = llm.vllm_config.model_config.get_diff_sampling_param()
        self._closed = False
        model = llm.vllm_config.model_config
        if described is None:
            described = loop.run(_describe(llm))
        first = min(described, key=lambda each: int(each["rank"]))
        self.info = EngineInfo(
            model=str(model.model),
            max_model_len=int(model.max_model_len),
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(llm.vllm_config.device_config.device_type),
            version=f"vLLM {compat.version()}",
            fingerprint=first["fingerprint"],
            context=tuple(first["context"]),
            refusal=next((each["refusal"] for each in described if each["refusal"]), None),
            header=None if first["header"] is None else tuple(first["header"]),
            permit=first["permit"],
            architectures=tuple(model.architectures),
        )

    @classmethod
    def launch(cls, model: str, config: BlendConfig, **options: Any) -> VLLMEngine:
        """Start vLLM; raises what ``launch.start`` raises."""
        loop = LoopThread()

        async def starting() -> AsyncLLM:
            return start(model, config, **options)

        llm = None
        try:
            llm = loop.run(starting())
            return cls(llm, loop, owned=True)
        except BaseException:
            if llm is not None:  # its processes would outlive us
                llm.shutdown()
            loop.stop()
            raise

    @classmethod
    def adopt(cls, llm: AsyncLLM) -> VLLMEngine:
        """Use an ``AsyncLLM`` that the caller has started with ``connector_arguments(config)``.

        When it has answered requests already, its loop must be running in another thread.

        Raises:
            ConfigError: it is no ``AsyncLLM``, runs without the connector, or lives in this thread's loop.
        """
        if not isinstance(llm, AsyncLLM):
            raise ConfigError(
                f"from_engine takes a vLLM AsyncLLM, not {type(llm).__name__}: build one with "
                "AsyncLLM.from_engine_args(AsyncEngineArgs(model, **connector_arguments(config)))."
            )
        handler = llm.output_handler
        loop = handler.get_loop() if handler is not None else None
        try:
            own = asyncio.get_running_loop()
        except RuntimeError:
            own = None
        if loop is not None and loop is own:
            raise ConfigError("The engine lives in this thread's event loop: call from_engine from another thread.")
        return cls(llm, LoopThread(loop), owned=False)

    @classmethod
    async def inside(cls, llm: AsyncLLM) -> VLLMEngine:
        """Use the ``AsyncLLM`` of a server, from its own event loop; ``run`` must not be called there.

        Raises:
            ConfigError: it runs without the connector.
        """
        described = await _describe(llm)
        engine = cls(llm, LoopThread(asyncio.get_running_loop()), owned=False, described=described)
        engine.chunks_at_once = _BESIDE_ANSWERS
        engine._closed = True  # the server closes it; by then its loop has ended
        return engine

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._llm.get_tokenizer()

    def sampling(self, settings: Sampling, *, stream: bool = False) -> SamplingParams:
        """See :meth:`Engine.sampling`."""
        return sampling_params(settings, self._defaults, stream=stream, structured_outputs=form(settings))

    def turn(self, request: ChatRequest, *, stream: bool = False) -> Turn:
        """See :meth:`Engine.turn`."""
        config = self._llm.vllm_config
        turn = ParsedTurn(
            request,
            self.tokenizer,
            self.template,
            self.info.architectures,
            config.model_config,
            reasons_first=bool(config.structured_outputs_config.reasoning_parser),
        )
        turn.params = sampling_params(
            request.sampling,
            self._defaults,
            stream=stream,
            structured_outputs=turn.structured_outputs,
            skip_special_tokens=turn.skip_special_tokens,
        )
        return turn

    def one_token(self) -> SamplingParams:
        """See :meth:`Engine.one_token`."""
        return SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)

    def watched(
        self, sampling_params: SamplingParams | None, *, whole: bool = False, most: int | None = None
    ) -> Watched:
        """See :meth:`Engine.watched`."""
        params = self._own(sampling_params)
        if whole:
            params.output_kind = RequestOutputKind.FINAL_ONLY
        if most is not None:
            params.max_tokens = min(params.max_tokens or most, most)
            params.min_tokens = min(params.min_tokens, params.max_tokens)
        keep = params.logprobs
        if keep is None or 0 <= keep < 2:  # −1 asks for all
            params.logprobs = 2
        if keep is not None and keep < 0:
            keep = self._llm.vllm_config.model_config.get_vocab_size()
        in_parts = params.output_kind == RequestOutputKind.DELTA
        return Watched(sampling_params=params, keep=keep, in_parts=in_parts, count=params.n)

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        options: dict[str, Any] | None = None,
        **extra: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """See :meth:`Engine.generate`."""
        return self._loop.stream(lambda: self._generate(prompt, sampling_params, options, extra))

    async def call(self, method: str, *arguments: Any) -> list[Any]:
        """See :meth:`Engine.call`."""
        work = self._llm.collective_rpc("kvblend", args=(method, *arguments))
        return list(await self._loop.run_async(work))

    async def reset_prefix_cache(self) -> bool:
        """See :meth:`Engine.reset_prefix_cache`."""
        return bool(await self._loop.run_async(self._llm.reset_prefix_cache()))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """See :meth:`Engine.run`."""
        return self._loop.run(work)

    def close(self) -> None:
        """Finish writing chunks, then stop vLLM if it was started here."""
        if self._closed:
            return
        self._closed = True
        try:
            with contextlib.suppress(EngineDeadError):  # what it had acknowledged is on disk
                self.run(self.call("close"))
        finally:
            if self._owned:
                self.run(self._stop_listening())
                self._llm.shutdown()
            self._loop.stop()
            # vLLM's engine must not be collected while the interpreter goes down: its finaliser fails then.
            del self._llm

    async def _stop_listening(self) -> None:
        """Of vLLM's shutdown, what ends its output handler; done first, or the handler logs that the engine died."""
        handler = getattr(self._llm, "output_handler", None)
        if handler is not None:
            handler.cancel()
            await asyncio.gather(handler, return_exceptions=True)

    def _own(self, sampling_params: SamplingParams | None) -> SamplingParams:
        """A copy to be changed; of the model's defaults when nothing is given."""
        return (sampling_params or SamplingParams.from_optional(**self._defaults)).clone()

    async def _generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None,
        options: dict[str, Any] | None,
        extra: dict[str, Any],
    ) -> AsyncIterator[RequestOutput]:
        params = self._own(sampling_params)
        if options:
            given = dict(params.extra_args or {})
            transfer = dict(given.get("kv_transfer_params") or {})
            transfer[PARAMETER] = {**transfer.get(PARAMETER, {}), **options}
            params.extra_args = {**given, "kv_transfer_params": transfer}
        request_id = f"kvblend-{os.getpid()}-{next(self._ids)}"
        submitted = time.time()
        first: float | None = None
        try:
            async for output in self._llm.generate(_as_vllm_prompt(prompt), params, request_id, **extra):
                now = time.time()
                if params.output_kind != RequestOutputKind.FINAL_ONLY and first is None:
                    first = now
                yield _converted(output, submitted, first, now, self.info.refusal)
        except EngineDeadError as error:
            raise EngineUnavailable("vLLM's engine has died; its log tells why. Make a new one.") from error
        except (ValueError, VLLMValidationError) as error:
            raise _explained(error, self.info) from error
        except EngineGenerateError as error:
            if isinstance(error.__cause__, ValueError):  # until 0.32 vLLM tells so of a grammar that it can't make
                raise _explained(error.__cause__, self.info) from error
            raise EngineUnavailable(f"vLLM failed on the request: {root_cause(error)}") from error


async def _describe(llm: AsyncLLM) -> list[dict[str, Any]]:
    try:
        return list(await llm.collective_rpc("kvblend", args=("describe",)))
    except Exception as error:
        raise ConfigError(
            "This engine runs without kvblend: start it with vllm_plugin.launch.connector_arguments(config)."
        ) from error


def _as_vllm_prompt(prompt: Prompt) -> Any:
    if isinstance(prompt, (str, dict)):
        return prompt
    return {"prompt_token_ids": np.asarray(prompt).tolist()}


def _converted(output: Any, submitted: float, first: float | None, now: float, refusal: str | None) -> RequestOutput:
    stats = output.metrics
    if first is None and stats is not None:
        first = stats.arrival_time + stats.first_token_latency
    metrics = RequestMetrics(first_scheduled_time=submitted, first_token_time=first or now, finished_time=now)
    told = (output.kv_transfer_params or {}).get(PARAMETER)
    report = BlendReport.from_dict(told) if told else BlendReport(request_id=output.request_id)
    if not told and output.finished and refusal is not None:  # vLLM runs some models without any connector
        report = dataclasses.replace(report, reason=f"this model can't be blended: {refusal}")
    return RequestOutput(
        request_id=output.request_id,
        prompt=output.prompt,
        prompt_token_ids=list(output.prompt_token_ids or ()),
        outputs=[
            CompletionOutput(
                index=each.index,
                text=each.text,
                token_ids=tuple(each.token_ids),
                cumulative_logprob=each.cumulative_logprob,
                logprobs=each.logprobs,
                finish_reason=each.finish_reason,
                stop_reason=each.stop_reason,
            )
            for each in output.outputs
        ],
        finished=output.finished,
        metrics=metrics,
        report=report,
    )


def _explained(error: Exception, info: EngineInfo) -> KVBlendError:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if PromptTooLong.is_meant_by(text):
        return PromptTooLong(f"The prompt does not fit into the model's context of {info.max_model_len} tokens: {text}")
    return ConfigError(f"vLLM does not accept the request: {text}")


__all__ = ["SamplingParams", "VLLMEngine", "connector_arguments"]
