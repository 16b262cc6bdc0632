"""Evidence for selectors, gathered from the model over loaded KV."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from kvblend_rag.config import ScoreLayers
from kvblend_rag.kernels.paged_caches import launches
from kvblend_rag.selectors.base import Evidence
from kvblend_rag.vllm_plugin.metadata import BlendJob
from kvblend_rag.vllm_plugin.worker.forward import Row, ScatteredForward
from kvblend_rag.vllm_plugin.worker.loader import Loader
from kvblend_rag.vllm_plugin.worker.paged_kv import AttentionLayer, PagedKV
from kvblend_rag.vllm_plugin.worker.taps import Taps

_WORKSPACE_ELEMENTS = 1 << 24
"""Attention logits held at a time: 64 MiB in float32, whatever the prompt's length."""

_DEVIATION_LAYER = 1
"""The first layer whose KV depends on what the chunks see of each other (CacheBlend, arXiv 2405.16444)."""


def scored_layers(layers: Sequence[AttentionLayer], choice: ScoreLayers) -> list[AttentionLayer]:
    """Those of the layers that see all whose attention tells what a question needs, at least one."""
    far_sighted = [layer for layer in layers if layer.sees_all] or list(layers)
    count = len(far_sighted)
    first = {"later": count // 3, "all": 0, "upper": count // 2, "middle": count // 3}[choice]
    return far_sighted[first : max(count - count // 3, 1) if choice == "middle" else count]


def question_attention(
    job: BlendJob,
    paged: PagedKV,
    forward: ScatteredForward,
    loader: Loader,
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
    see_last: Callable[[torch.Tensor], None] | None = None,
) -> tuple[dict[str, torch.Tensor], int]:
    """Attention of the question on each reused token: ``question_mass`` and ``last_mass``.

    A first pass of the computed tokens over the loaded KV, up to the last layer that is looked at; they
    are computed again, over recomputed KV, in the forward that counts.

    Args:
        job: the request.
        paged: the cache.
        forward: runs the layers.
        loader: has started to load the request.
        sum_over_ranks: all-reduce.
        see_last: gets the last prompt token's hidden state over the loaded KV; the pass then goes through all layers.

    Returns:
        The evidence, float32, shape (reused tokens,), and the number of tokens passed.
    """
    plan, layers = job.plan, scored_layers(paged.layers, job.recipe.layers)
    seen = {layer.name for layer in layers}
    taps = Taps([layer.name for layer in paged.layers], loader.wait, see=seen, whole=see_last is not None)
    rows = [Row(job.token_ids, job.block_ids, start, stop) for start, stop in plan.computed_ranges()]
    positions = forward.run(rows, around=taps, see_last=see_last)
    asked = paged.upload(torch.from_numpy(np.flatnonzero(positions >= plan.question_range[0])))
    query_positions = paged.upload(torch.from_numpy(positions.astype(np.int64)))[asked]
    reused = paged.upload(torch.from_numpy(plan.reused_positions()[0]))
    queries = [layer.meeting_keys(torch.cat(taps.queries[layer.name])) for layer in layers]
    masses = _masses(torch.stack(queries)[:, asked], query_positions, layers, job, paged)
    question_mass, last_mass = sum_over_ranks(masses[:, reused]) / len(layers)
    return {"question_mass": question_mass, "last_mass": last_mass}, len(positions)


def _masses(
    queries: torch.Tensor,
    query_positions: torch.Tensor,
    layers: Sequence[AttentionLayer],
    job: BlendJob,
    paged: PagedKV,
) -> torch.Tensor:
    """(2, prompt tokens) float32: ``_attention``, summed over layers.

    Args:
        queries: (layers, queries, heads, query_dim), as they meet the layers' cached keys.
        query_positions: (queries,) int64.
        layers: whose attention it is.
        job: the request.
        paged: the cache.
    """
    keys = job.plan.prompt_tokens
    masses = torch.zeros(2, keys, device=paged.device)
    scales = [float(layer.module.impl.scale) for layer in layers]
    if paged.caches is None:
        for asking, layer, scale in zip(queries, layers, scales, strict=True):
            masses += _attention(asking, query_positions, paged.read_keys(layer, job.block_ids, keys), scale)
        return masses
    from kvblend_rag.kernels.column_mass import column_mass  # needs Triton

    table = paged.table(job.block_ids, keys)
    # Many layers at once: launching them one by one takes a short prompt longer than they do.
    for part in launches(scales, max(1, _WORKSPACE_ELEMENTS // (2 * paged.heads * keys))):
        asking = queries[part.start : part.stop]
        where = paged.upload(paged.caches.addresses_of(paged.layers.index(layers[index]) for index in part))
        masses += column_mass(asking, query_positions, paged.caches, where, table, keys, scales[part.start])
    return masses


def _attention(queries: torch.Tensor, query_positions: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """(2, keys) float32: softmax attention, mean over heads; of all queries, and of the last one alone.

    Args:
        queries: (queries, heads, head_dim).
        query_positions: (queries,) int64; a query sees the keys up to its own position.
        keys: (keys, kv_heads, head_dim), those of positions 0, 1, …
        scale: of the logits.
    """
    count, heads, kv_heads = len(queries), queries.shape[1], keys.shape[1]
    grouped = queries.unflatten(1, (kv_heads, -1)).permute(1, 0, 2, 3).contiguous()  # (kv_heads, queries, group, dim)
    at_once = max(1, _WORKSPACE_ELEMENTS // (len(keys) * grouped.shape[2]))
    every = torch.arange(len(keys), device=keys.device)
    last = int(query_positions.argmax())
    masses = torch.zeros(2, len(keys), device=keys.device)
    for kv_head in range(kv_heads):
        turned = keys[:, kv_head].T
        for start in range(0, count, at_once):
            part = slice(start, min(start + at_once, count))
            logits = (grouped[kv_head, part] @ turned).float() * scale
            hidden = every > query_positions[part, None, None]
            mass = logits.masked_fill_(hidden, -torch.inf).softmax(dim=-1).sum(dim=1)
            masses[0] += mass.sum(dim=0)
            if part.start <= last < part.stop:
                masses[1] += mass[last - part.start]
    masses[0] /= count
    return masses / heads


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
    reused = paged.upload(torch.from_numpy(job.plan.reused_positions()[0]))
    computed = [each[reused] for each in paged.read(layer, job.block_ids, job.plan.prompt_tokens)]
    names = ("key_deviation", "value_deviation")
    return {
        name: sum_over_ranks((new.float() - old.float()).square().sum(dim=(1, 2)))
        for name, new, old in zip(names, computed, loaded, strict=True)
    }, len(passed)


def deviation_layer(paged: PagedKV) -> AttentionLayer:
    """The layer at which stored and computed KV are compared."""
    return paged.layers[min(_DEVIATION_LAYER, len(paged.layers) - 1)]


def shares(paged: PagedKV, layers: ScoreLayers = "later") -> dict[Evidence, float]:
    """Of the layers, the share that gathering each kind of evidence goes through."""
    seen = {
        Evidence.QUESTION_ATTENTION: scored_layers(paged.layers, layers)[-1],
        Evidence.DEVIATION: deviation_layer(paged),
    }
    return {kind: (paged.layers.index(last) + 1) / len(paged.layers) for kind, last in seen.items()}


__all__ = ["deviation", "deviation_layer", "question_attention", "scored_layers", "shares"]
