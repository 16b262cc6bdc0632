"""Our sampling settings as vLLM's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from kvblend_rag.conversation.sampling import Sampling
from kvblend_rag.errors import ConfigError


def sampling_params(
    settings: Sampling,
    defaults: Mapping[str, Any],
    *,
    stream: bool,
    structured_outputs: StructuredOutputsParams | None,
    skip_special_tokens: bool = True,
) -> SamplingParams:
    """vLLM's parameters for one request.

    Args:
        settings: what was asked for.
        defaults: the model's own, for what was not.
        stream: outputs hold what is new since the last.
        structured_outputs: the constraint, made of ``settings`` or of tools.
        skip_special_tokens: leave special tokens out of the text.

    Raises:
        ConfigError: a value that vLLM does not accept.
    """
    values = {**defaults, "max_tokens": defaults.get("max_tokens")}
    values.update(settings.given())
    try:
        return SamplingParams(
            **{
                **values,
                "n": settings.n,
                "stop": list(settings.stop),
                "logprobs": settings.top_logprobs if settings.logprobs or settings.top_logprobs else None,
                "structured_outputs": structured_outputs,
                "skip_special_tokens": skip_special_tokens,
                "output_kind": RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
                **settings.extra,
            }
        )
    except (TypeError, ValueError, VLLMValidationError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0].split(" (parameter=")[0]
        raise ConfigError(f"vLLM does not accept the sampling settings: {line}") from error


__all__ = ["sampling_params"]
