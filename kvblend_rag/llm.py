"""LLM: vLLM's offline interface, with stored chunks blended into the prompts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from kvblend_rag.config import BlendConfig
from kvblend_rag.engine import Engine, Prompt
from kvblend_rag.errors import ConfigError
from kvblend_rag.kvblend import KVBlend
from kvblend_rag.output import CompletionOutput, RequestOutput

Message = Mapping[str, Any]


class LLM:
    """A model that reuses the KV of ingested chunks wherever they stand in a prompt.

    Used as vLLM's own ``LLM``; its engine starts with it. Blending is configured by a YAML file named in
    ``KVBLEND_CONFIG_FILE``, by ``KVBLEND_*`` variables, or by ``config``.

    Args:
        model: folder or hub name.
        config: blending and store; None reads file and environment.
        options: any of vLLM's engine arguments, such as ``gpu_memory_utilization``, ``max_model_len``.

    Raises:
        ModelNotFound: there is no such model.
        EngineUnavailable: vLLM is not installed or did not start.
        ConfigError: a setting or argument can't be used.
    """

    def __init__(self, model: str | Path = "", *, config: BlendConfig | None = None, **options: Any) -> None:
        config = config or BlendConfig.load()
        self.kvblend = KVBlend(
            config.replace(model=str(model) or config.model, engine_args={**config.engine_args, **options})
        )
        self._start()

    @classmethod
    def from_engine(cls, engine: Any, config: BlendConfig | None = None) -> LLM:
        """Use an engine that runs already.

        Args:
            engine: vLLM's ``AsyncLLM``, started with ``connector_arguments(config)``, or an ``Engine``.
            config: the configuration it was started with.
        """
        if not isinstance(engine, Engine):
            from kvblend_rag.vllm_plugin.engine import VLLMEngine

            engine = VLLMEngine.adopt(engine)
        llm = cls.__new__(cls)
        llm.kvblend = KVBlend(config or BlendConfig.load(), engine)
        return llm

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Any = None,
        *,
        use_tqdm: bool = False,
        blend: Mapping[str, Any] | None = None,
        **extra: Any,
    ) -> list[RequestOutput]:
        """Answer prompts, all in one batch of the engine.

        Args:
            prompts: text, token ids, a vLLM prompt dictionary, or a list of such.
            sampling_params: one for all, or one a prompt; None for vLLM's defaults.
            use_tqdm: show a progress bar.
            blend: this call's blending: ``blend``, ``selector``, ``ratio``, ``span``.
            extra: passed on to vLLM's ``generate``.

        Returns:
            One output a prompt, in order, each with ``metrics`` and ``report``.

        Raises:
            PromptTooLong: a prompt leaves no room in the context.
            ConfigError: a value that can't be used.
        """
        batch = _as_list(prompts)
        if not batch:
            return []
        several = isinstance(sampling_params, Sequence)
        if several and len(sampling_params) != len(batch):
            raise ConfigError(
                f"{len(batch)} prompts came with {len(sampling_params)} sampling parameters: give one each."
            )
        params = list(sampling_params) if several else [sampling_params] * len(batch)

        async def answers() -> list[RequestOutput]:
            with tqdm(total=len(batch), desc="Answering", disable=not use_tqdm) as bar:

                async def one(prompt: Prompt, own: Any) -> RequestOutput:
                    outputs = self.kvblend.stream(prompt, own, blend=blend, whole=True, **extra)
                    final = await _whole(outputs)
                    bar.update()
                    return final

                return list(await asyncio.gather(*map(one, batch, params)))

        return self.kvblend.engine.run(answers())

    def stream(
        self,
        prompt: Prompt,
        sampling_params: Any = None,
        *,
        blend: Mapping[str, Any] | None = None,
        **extra: Any,
    ) -> AsyncIterator[RequestOutput]:
        """Outputs of one prompt as they come; iterate in any event loop, leave to abort."""
        return self.kvblend.stream(prompt, sampling_params, blend=blend, **extra)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Any = None,
        *,
        use_tqdm: bool = False,
        blend: Mapping[str, Any] | None = None,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer conversations through the model's chat template.

        Args:
            messages: one conversation of ``{"role": …, "content": …}``, or several.
            sampling_params: as for ``generate``.
            use_tqdm: as for ``generate``.
            blend: as for ``generate``.
            template: passed on to the chat template, such as ``tools``.
        """
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations = list(messages) if several else [messages]
        prompts = [self.render(conversation, **template) for conversation in conversations]  # type: ignore[arg-type]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, blend=blend)

    def render(self, messages: Sequence[Message], **template: Any) -> list[int]:
        """The token ids of a conversation, as vLLM's chat endpoint would make them.

        Raises:
            ConfigError: there is no chat template, or it does not take these messages.
        """
        return self.kvblend.engine.render(messages, **template)

    def get_tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.kvblend.engine.tokenizer

    def close(self) -> None:
        """Stop the engine; a second call does nothing."""
        self.kvblend.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(self) -> None:
        assert self.kvblend.engine is not None


async def _whole(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    """The last output with all answers: of several to one prompt, vLLM shows each when it has got further."""
    final, report = None, None
    answers: dict[int, CompletionOutput] = {}
    async for final in outputs:
        answers.update((answer.index, answer) for answer in final.outputs)
        if final.report.blended:  # the other answers may have found its KV
            report = final.report
    assert final is not None
    return replace(final, outputs=[answers[index] for index in sorted(answers)], report=report or final.report)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (str, dict)):
        return [prompts]
    if len(prompts) and isinstance(prompts[0], (int, np.integer)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)


__all__ = ["LLM"]
