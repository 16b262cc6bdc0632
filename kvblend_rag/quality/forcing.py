"""An answer's likelihood over blended KV: the engine decodes what it is told to, and says how likely that was.

``prompt_logprobs`` would score an answer too, but a request with it gets an ordinary prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvblend_rag.conversation.sampling import Sampling
from kvblend_rag.engine import Engine
from kvblend_rag.errors import EngineUnavailable
from kvblend_rag.output import RequestOutput
from kvblend_rag.quality.metrics import Distribution

LIKELIEST = 256
"""Next tokens listed at each position."""


def engine_arguments() -> dict[str, Any]:
    """What an engine must be started with to force tokens."""
    from kvblend_rag.vllm_plugin.forced_tokens import PROCESSOR

    return {"logits_processors": [PROCESSOR], "max_logprobs": LIKELIEST}


def forcing(engine: Engine, tokens: Sequence[int]) -> Any:
    """Sampling parameters of a request whose answer is these tokens."""
    from kvblend_rag.vllm_plugin.forced_tokens import FORCED_TOKENS

    extra = {
        "extra_args": {FORCED_TOKENS: [int(token) for token in tokens]},
        "logprobs": LIKELIEST,
        "ignore_eos": True,
        "detokenize": False,
    }
    return engine.sampling(Sampling(temperature=0.0, max_tokens=len(tokens), extra=extra))


def distributions(output: RequestOutput, tokens: Sequence[int]) -> tuple[list[float], list[Distribution]]:
    """Log-probability of each forced token, and the distribution it was taken from.

    Raises:
        EngineUnavailable: the engine decoded something else.
    """
    completion = output.outputs[0]
    if list(completion.token_ids) != list(tokens) or completion.logprobs is None:
        raise EngineUnavailable(
            "The engine did not decode the tokens it was given: start it with quality.forcing.engine_arguments()."
        )
    steps = [{token: float(each.logprob) for token, each in step.items()} for step in completion.logprobs]
    own = [step[token] for token, step in zip(tokens, steps, strict=True)]
    return own, [Distribution.of(step) for step in steps]


__all__ = ["LIKELIEST", "distributions", "engine_arguments", "forcing"]
