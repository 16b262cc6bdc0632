"""The gate: may this request be blended? Otherwise a reason, in words a user understands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RequestFacts:
    """What about a request speaks against blending it."""

    has_text: bool = True
    """The prompt is token ids, and not embeddings."""
    multimodal: bool = False
    lora: bool = False
    pooling: bool = False
    prompt_logprobs: bool = False
    resumable: bool = False
    """A session to which later input is appended."""
    skips_prefix_cache: bool = False
    """It must not read what was computed before; vLLM then takes no KV from a connector either."""


def refusal(
    facts: RequestFacts, *, model: str | None, enabled: bool, wanted: bool, verdict: str | None = None
) -> str | None:
    """Why the request gets an ordinary prefill, or None when it may be blended.

    Args:
        facts: the request's.
        model: why the model or an engine option can't be blended, from the start-up survey.
        enabled: the engine's ``enable_blending``.
        wanted: the request's own ``blend`` parameter.
        verdict: why calibration refused the model, if it did.
    """
    reasons = (
        (model is not None, f"this model can't be blended: {model}"),
        (verdict is not None, f"calibration refused this model: {verdict}"),
        (not enabled, "blending is switched off (enable_blending: false)"),
        (not wanted, "the request asked for an ordinary prefill"),
        (not facts.has_text, "the prompt is given as embeddings"),
        (facts.multimodal, "the prompt holds images, audio or video"),
        (facts.lora, "the request uses a LoRA adapter"),
        (facts.pooling, "the request asks for a pooled output"),
        (facts.prompt_logprobs, "prompt log-probabilities need an ordinary prefill"),
        (facts.resumable, "the request belongs to a session whose input goes on"),
        (facts.skips_prefix_cache, "the request skips the prefix cache, and with it all KV computed before"),
    )
    return next((reason for applies, reason in reasons if applies), None)


__all__ = ["RequestFacts", "refusal"]
