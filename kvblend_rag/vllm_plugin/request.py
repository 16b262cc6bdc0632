"""What a request asks of kvblend, in ``kv_transfer_params["kvblend"]``; the same over HTTP.

blend        false for an ordinary prefill
selector, ratio, span, layers, coverage, full_prefill_share    how recomputed tokens are chosen, and how many
carry        how much of what that changes is carried to the other tokens
max_risk     below 1: the next token is compared before and after recomputing, for whoever judges the risk
planner      false: load every chunk that is found, be it slower than computing it
tenant       whose chunks may be used; vLLM's own cache_salt means the same
ingest       {key, namespace, start}: save the KV of the prompt from ``start`` on; with {permit} behind a companion
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.v1.request import Request

from kvblend_rag.blend.gate import RequestFacts
from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import ConfigError
from kvblend_rag.selectors import get_selector
from kvblend_rag.vllm_plugin.metadata import Recipe

PARAMETER = "kvblend"


@dataclass(frozen=True)
class Ingest:
    """The chunk that a request computes in order to store it."""

    key: str
    namespace: str
    start: int
    permit: str = ""
    """Shown by this engine's own ingest alone."""


@dataclass(frozen=True)
class Wish:
    """A request's own settings, completed from the engine's."""

    blend: bool
    recipe: Recipe
    tenant: str
    ingest: Ingest | None
    planner: bool = True


def read_wish(request: Request, config: BlendConfig) -> Wish:
    """The request's settings.

    Raises:
        ConfigError: an unknown parameter or a value that can't be used.
    """
    given: Any = (request.kv_transfer_params or {}).get(PARAMETER, {})
    if not isinstance(given, dict):
        raise ConfigError(f"kv_transfer_params['{PARAMETER}'] must be a mapping, and is {given!r}.")
    given = dict(given)
    ingest = given.pop("ingest", None)
    wished = config.for_request(given)
    get_selector(wished.selector)
    return Wish(
        blend=bool(given.get("blend", True)),
        recipe=recipe_of(wished),
        tenant=_owner(wished.tenant, getattr(request, "cache_salt", None)),
        ingest=None if ingest is None else _read_ingest(ingest),
        planner=wished.planner,
    )


def recipe_of(config: BlendConfig) -> Recipe:
    """How recomputed tokens are chosen, as these settings say."""
    return Recipe(
        config.selector,
        config.recompute_ratio,
        config.span_size,
        config.coverage,
        config.full_prefill_share,
        config.score_layers,
        config.carry,
        watched=config.max_risk < 1,
    )


def _owner(tenant: str, salt: str | None) -> str:
    """Whose chunks the request may use: who keeps apart from others in the prefix cache keeps apart here too."""
    if salt and tenant not in ("", salt):
        raise ConfigError("The request's cache_salt is not its tenant: give the same twice, or the salt alone.")
    return salt or tenant


def _read_ingest(given: Any) -> Ingest:
    match given:
        case {"key": str(key), "namespace": str(space), "start": int(start), **more} if start >= 0:
            if more.keys() <= {"permit"}:
                return Ingest(key, space, start, str(more.get("permit", "")))
    raise ConfigError(f"`ingest` is {given!r}, and must hold a key, a namespace and a start.")


def facts(request: Request) -> RequestFacts:
    """What speaks against blending the request."""
    sampling = request.sampling_params
    return RequestFacts(
        has_text=request.prompt_token_ids is not None and getattr(request, "prompt_embeds", None) is None,
        multimodal=bool(request.mm_features),
        lora=request.lora_request is not None,
        pooling=request.pooling_params is not None,
        prompt_logprobs=sampling is not None and sampling.prompt_logprobs is not None,
        resumable=bool(getattr(request, "resumable", False)),
        skips_prefix_cache=bool(getattr(request, "skip_reading_prefix_cache", False)),
    )


__all__ = ["PARAMETER", "Ingest", "Wish", "facts", "read_wish", "recipe_of"]
