"""Teacher forcing: a logits processor that leaves a request one token a step, the next of an answer it is given.

vLLM takes raw log-probabilities before logits processors (vllm/v1/sample/sampler.py), so what a step reports
is the model's own distribution. Model Runner V1 only: V2 has processors of another kind, or none (0.26).
"""

from __future__ import annotations

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

PROCESSOR = f"{__name__}:ForcedTokens"
"""How vLLM's argument ``logits_processors`` names it."""

FORCED_TOKENS = "kvblend_forced_tokens"
"""A request's token ids, in ``extra_args``."""

_Forced = tuple[list[int], list[int]]


class ForcedTokens(LogitsProcessor):
    """Obeys ``extra_args["kvblend_forced_tokens"]``; other requests are untouched."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._requests: dict[int, _Forced] = {}
        """By row of the batch: what is forced, and vLLM's own list of what was decoded."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ValueError unless the tokens are a list of ints, one a step at least."""
        tokens = (sampling_params.extra_args or {}).get(FORCED_TOKENS)
        if tokens is None:
            return
        if not isinstance(tokens, list) or not all(isinstance(token, int) and token >= 0 for token in tokens):
            raise ValueError(f"{FORCED_TOKENS} must be a list of token ids.")
        if sampling_params.max_tokens is None or sampling_params.max_tokens > len(tokens):
            raise ValueError(f"{FORCED_TOKENS} holds {len(tokens)} tokens: set max_tokens to as many.")

    def is_argmax_invariant(self) -> bool:
        """It decides what is decoded, also greedily."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Requests came, went or moved."""
        process_dict_updates(self._requests, batch_update, _state)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Mask all but the next forced token, in place; ``logits`` has shape (requests, vocabulary)."""
        # With asynchronous scheduling the list holds placeholders, as many as steps were taken.
        forced = {row: tokens[len(done)] for row, (tokens, done) in self._requests.items() if len(done) < len(tokens)}
        if forced:
            rows = torch.tensor(list(forced), device=logits.device)
            logits[rows] = -torch.inf
            logits[rows, torch.tensor(list(forced.values()), device=logits.device)] = 0.0
        return logits


def _state(params: SamplingParams, _: list[int] | None, done: list[int]) -> _Forced | None:
    tokens = (params.extra_args or {}).get(FORCED_TOKENS)
    return (tokens, done) if tokens else None


__all__ = ["FORCED_TOKENS", "PROCESSOR", "ForcedTokens"]
