"""KVBlendLLM: plain completions, without a chat template."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models.base import LangSmithParams
from langchain_core.language_models.llms import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult

from kvblend_rag.conversation.turn import ChatDelta
from kvblend_rag.conversation.turn import ChatResult as Answer
from langchain_kvblend._messages import PROVIDER, as_usage, logprobs_of, response_metadata
from langchain_kvblend._model import EngineModel, again, again_async, one_answer, stream_again, stream_again_async


class KVBlendLLM(EngineModel, BaseLLM):
    """Continues texts as they stand, in vLLM, and reuses the stored KV of the chunks in them.

    For conversations, tools and structured output use :class:`ChatKVBlend`. Several prompts are one batch of the
    engine. ``generation_info`` holds the finish reason, token counts and ``blend_report`` of each answer.
    """

    @property
    def _llm_type(self) -> str:
        return "kvblend"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return self._identity

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop or self.stop, **kwargs)
        return LangSmithParams(**{**params, "ls_provider": PROVIDER})

    def _request(self, stop: list[str] | None, given: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        given = dict(given)
        return self._retries(given), self._options(stop, given)

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        retries, options = self._request(stop, kwargs)
        return self._result(again(lambda: self._chat.complete_text_batch(prompts, **options), retries))

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        retries, options = self._request(stop, kwargs)
        chat = self._chat

        async def answer(prompt: str) -> Answer:
            return await again_async(lambda: chat.complete_text(prompt, **options), retries)

        return self._result(await asyncio.gather(*map(answer, prompts)))

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        retries, options = self._request(stop, kwargs)
        one_answer(options)
        with contextlib.closing(
            stream_again(lambda: self._chat.stream_text_sync(prompt, **options), retries)
        ) as deltas:
            for delta in deltas:
                chunk = self._chunk(delta)
                if run_manager:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        retries, options = self._request(stop, kwargs)
        one_answer(options)
        deltas = stream_again_async(lambda: self._chat.stream_text(prompt, **options), retries)
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                chunk = self._chunk(delta)
                if run_manager:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def get_token_ids(self, text: str) -> list[int]:
        """Token ids of a text, by the model's own tokenizer; starts the engine."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return self._chat.token_ids(text)

    def _result(self, answers: list[Answer]) -> LLMResult:
        generations: list[Any] = []
        for answer in answers:
            self._remember(answer)
            about = {**response_metadata(answer, self.model), "usage": as_usage(answer.usage)}
            generations.append(
                [
                    Generation(
                        text=each.text,
                        generation_info={**about, "finish_reason": each.finish_reason, **logprobs_of(each.logprobs)},
                    )
                    for each in answer.generations
                ]
            )
        read = sum(answer.usage.input_tokens for answer in answers)
        written = sum(answer.usage.output_tokens for answer in answers)
        used = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        return LLMResult(
            generations=generations,
            llm_output={"token_usage": used, "model_name": self.model},
        )

    def _chunk(self, delta: ChatDelta) -> GenerationChunk:
        self._remember(delta)
        about: dict[str, Any] = logprobs_of(delta.logprobs or None)
        if delta.usage is not None:
            about |= {**response_metadata(delta, self.model), "usage": as_usage(delta.usage)}
        if delta.finish_reason is not None:
            about["finish_reason"] = delta.finish_reason
        return GenerationChunk(text=delta.text, generation_info=about or None)


__all__ = ["KVBlendLLM"]
