"""Evidence for selectors, gathered from the model over loaded KV."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from kvblend_rag.vllm_plugin.forward import Row, ScatteredForward
from kvblend_rag.vllm_plugin.loader import Loader
from kvblend_rag.vllm_plugin.metadata import BlendJob
from kvblend_rag.vllm_plugin.paged_kv import AttentionLayer, PagedKV
from kvblend_rag.vllm_plugin.taps import Taps

_DEVIATION_LAYER = 1
"""The first layer whose KV depends on what the chunks see of each other (CacheBlend, arXiv 2405.16444)."""


def middle_layers(layers: Sequence[AttentionLayer]) -> list[AttentionLayer]:
    """The middle third, whose attention tells best what a question needs (docs/quality.md)."""
    count = len(layers)
    low, high = count // 3, max(2 * count // 3, count // 3 + 1)
    return list(layers[low:high])


def question_attention(
    job: BlendJob,
    paged: PagedKV,
    forward: ScatteredForward,
    loader: Loader,
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[dict[str, torch.Tensor], int]:
    """Attention of the question on each reused token: ``question_mass`` and ``last_mass``.

    A first pass of the computed tokens over the loaded KV, up to the last layer that is looked at; they
    are computed again, over recomputed KV, in the forward that counts.

    Returns:
        The evidence, float32, shape (reused tokens,), and the number of tokens passed.
    """
    plan, layers = job.plan, middle_layers(paged.layers)
    taps = Taps([layer.name for layer in paged.layers], loader.wait, see={layer.name for layer in layers})
    rows = [Row(job.token_ids, job.block_ids, start, stop) for start, stop in plan.computed_ranges()]
    positions = forward.run(rows, around=taps)
    asked = torch.from_numpy(np.flatnonzero(positions >= plan.question_range[0])).to(paged.device)
    query_positions = torch.from_numpy(positions.astype(np.int64)).to(paged.device)[asked]
    last = int(query_positions.argmax())
    hidden = torch.arange(plan.prompt_tokens, device=paged.device)[None, :] > query_positions[:, None]
    reused = torch.from_numpy(plan.reused_positions()[0]).to(paged.device)
    question_mass = torch.zeros(len(reused), device=paged.device)
    last_mass = torch.zeros_like(question_mass)
    for layer in layers:
        queries = torch.cat(taps.queries[layer.name])[asked]
        keys, _ = paged.read(layer, job.block_ids, plan.prompt_tokens)
        mass = _attention(queries, keys, float(layer.module.impl.scale), hidden)[:, reused]
        question_mass += mass.mean(dim=0)
        last_mass += mass[last]
    return {
        "question_mass": sum_over_ranks(question_mass) / len(layers),
        "last_mass": sum_over_ranks(last_mass) / len(layers),
    }, len(positions)


def _attention(queries: torch.Tensor, keys: torch.Tensor, scale: float, hidden: torch.Tensor) -> torch.Tensor:
    """(queries, keys) float32: softmax attention, mean over heads.

    Args:
        queries: (queries, heads, head_dim).
        keys: (keys, kv_heads, head_dim).
        scale: of the logits.
        hidden: (queries, keys) bool, what a query must not see.
    """
    kv_heads = keys.shape[1]
    grouped = queries.float().unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
    logits = grouped @ keys.float().permute(1, 2, 0)[:, None] * scale
    return logits.masked_fill_(hidden, -torch.inf).softmax(dim=-1).mean(dim=(0, 1))


def deviation(
    job: BlendJob,
    loaded: tuple[torch.Tensor, torch.Tensor],
    paged: PagedKV,
    forward: ScatteredForward,
    loader: Loader,
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[dict[str, torch.Tensor], int]:
    """How far each reused token's stored KV is from what full attention gives at an early layer.

    Computes all tokens through the first layers, as one causal sequence, and leaves their exact KV there.

    Args:
        job: the request.
        loaded: keys and values of ``deviation_layer`` as stored, keys rotated, (reused tokens, kv_heads, head_dim).
        paged: the cache.
        forward: runs the layers.
        loader: has started to load the request.
        sum_over_ranks: all-reduce.

    Returns:
        ``key_deviation`` and ``value_deviation``, float32, shape (reused tokens,), and the tokens passed.
    """
    layer = deviation_layer(paged)
    taps = Taps([each.name for each in paged.layers], loader.wait, see={layer.name})
    row = Row(job.token_ids, job.block_ids, job.first, job.plan.prompt_tokens - 1)
    passed = forward.run([row], around=taps)
    reused = torch.from_numpy(job.plan.reused_positions()[0]).to(paged.device)
    computed = [each[reused] for each in paged.read(layer, job.block_ids, job.plan.prompt_tokens)]
    names = ("key_deviation", "value_deviation")
    return {
        name: sum_over_ranks((new.float() - old.float()).square().sum(dim=(1, 2)))
        for name, new, old in zip(names, computed, loaded, strict=True)
    }, len(passed)


def deviation_layer(paged: PagedKV) -> AttentionLayer:
    """The layer at which stored and computed KV are compared."""
    return paged.layers[min(_DEVIATION_LAYER, len(paged.layers) - 1)]


__all__ = ["deviation", "deviation_layer", "middle_layers", "question_attention"]
