"""Carry: what recomputing changes in a chunk's tokens reaches its other ones."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kvblend_rag.blend.carry import carried
from kvblend_rag.blend.rope import Rotary, rotate, shift

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def rig(rigs):
    """In one layer KV hangs on nothing before it: all that recomputing changes is what was planted."""
    return rigs.get("llama-one-layer", blocks=24, ingest_context="none", local_device="disk")


@pytest.fixture(scope="module")
def pushed(rig, tiny_model):
    """Two chunks, each stored token's value pushed by one vector, and its key by another before it is rotated."""
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    rotary = LlamaRotaryEmbedding(transformers.AutoConfig.from_pretrained(tiny_model("llama-one-layer")))
    chunks = [rig.tokens(150, 71), rig.tokens(200, 72)]
    rig.store(*chunks)
    found = [rig.stored(each) for each in chunks]
    key, value = torch.randn(2, *found[0].shape[3:], generator=torch.Generator().manual_seed(0))
    value *= found[0][:, 1].std()
    for chunk, kv in zip(chunks, found, strict=True):
        here = key.expand(1, kv.shape[2], -1, -1).transpose(1, 2)
        turned, _ = apply_rotary_pos_emb(here, here, *rotary(here, torch.arange(kv.shape[2])[None]))
        rig.rewrite(chunk, torch.stack([kv[:, 0] + turned.transpose(1, 2), kv[:, 1] + value], dim=1))
    return chunks


def prompt_of(rig, chunks):
    return np.concatenate([rig.tokens(20, 1), chunks[0], rig.tokens(1, 2), chunks[1], rig.tokens(60, 3)])


@pytest.mark.parametrize("selector", ["first", "question"])  # the pass of ``deviation`` writes the only layer anew
def test_a_change_that_all_tokens_share_is_undone(rig, pushed, selector):
    prompt = prompt_of(rig, pushed)
    (stored,) = rig.fresh([prompt], selector=selector, ratio=0.3)
    (carried,) = rig.fresh([prompt], selector=selector, ratio=0.3, carry=1.0)
    assert stored.report.recomputed_tokens == carried.report.recomputed_tokens == 105
    plain = rig.plain(prompt)
    assert stored.token_ids != plain.token_ids or stored.difference(plain) > 50 * TOLERANCE
    assert carried.difference(plain) < TOLERANCE


def test_what_is_carried_is_not_taken_for_what_is_not(rig, pushed):
    prompt = prompt_of(rig, pushed)
    budget = {"selector": "first", "ratio": 0.3}
    alone = [rig.fresh([prompt], carry=carry, **budget)[0] for carry in (0.0, 0.5, 1.0)]
    rig.reset()
    for carry, expected in zip((0.0, 0.5, 1.0), alone, strict=True):
        (answer,) = rig.ask([prompt], carry=carry, **budget)
        assert answer.report.cached_tokens < 48
        assert answer.difference(expected) < TOLERANCE
        (again,) = rig.ask([prompt], carry=carry, **budget)
        assert again.report.cached_tokens > 350
        assert again.difference(expected) < TOLERANCE


@pytest.mark.parametrize("selector", ["first", "deviation", "question", "everything"])
def test_with_everything_recomputed_nothing_is_left_to_change(rig, pushed, selector):
    prompt = prompt_of(rig, pushed)
    (exact,) = rig.fresh([prompt], selector=selector, ratio=1.0, carry=1.0)
    assert exact.report.recomputed_tokens == 350
    assert exact.difference(rig.plain(prompt)) < TOLERANCE


def test_without_recomputed_tokens_nothing_is_known(rig, pushed):
    plain, changed = (rig.fresh([prompt_of(rig, pushed)], selector="none", carry=carry)[0] for carry in (0.0, 1.0))
    assert changed.difference(plain) == 0


def test_tokens_that_disagree_carry_nothing():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40, 2, 64, generator=generator)
    chunk = torch.arange(40) // 20
    shared = torch.ones(2, 64)
    assert carried(noise, chunk, 2).norm() < 0.3 * carried(noise + 0.5 * shared, chunk, 2).norm()
    assert torch.allclose(carried(5 * shared.expand(40, -1, -1), chunk, 2), 5 * shared.expand(2, -1, -1))
    # One chunk moved, one did not; and of a third nothing is known but what the two show.
    one = torch.where((chunk == 0)[:, None, None], 5 * shared, 0 * shared) + 0.01 * noise
    first, second, third = carried(one, chunk, 3)
    assert first.mean() > 3.5 > 1.5 > second.mean()
    assert third.shape == (2, 64)


def test_what_is_exact_stays_and_each_other_token_is_moved_once():
    from kvblend_rag.vllm_plugin.worker.carry_over import CarryOver
    from kvblend_rag.vllm_plugin.worker.paged_kv import AttentionLayer, PagedKV

    rows, heads, dim, tokens = 16, 2, 32, 90
    generator = torch.Generator().manual_seed(0)

    def write(layer, keys, values, cache, slots):
        cache[slots // rows, :, slots % rows] = torch.cat([keys, values], dim=-1)

    cache = torch.zeros(9, heads, rows, 2 * dim)
    rotary = Rotary(
        torch.cat([(angles := torch.outer(torch.arange(100.0), 0.7 ** torch.arange(12))).cos(), angles.sin()], -1),
        False,
    )
    layer = AttentionLayer(
        "one", SimpleNamespace(kv_cache=cache, impl=SimpleNamespace(do_kv_cache_update=write)), rotary
    )
    paged = PagedKV([layer], rows)
    blocks = np.array([7, 2, 5, 1, 8, 3], dtype=np.int32)
    runs = [SimpleNamespace(exact=exact, start=start) for start, exact in ((5, True), (30, False), (60, False))]
    reused = np.concatenate([np.arange(run.start, run.start + 20) for run in runs])
    plan = SimpleNamespace(
        runs=runs, prompt_tokens=tokens, reused_positions=lambda: (reused, np.repeat(np.arange(3), 20))
    )
    job = SimpleNamespace(plan=plan, block_ids=blocks, recipe=SimpleNamespace(carry=1.0))

    true = torch.randn(2, tokens, heads, dim, generator=generator)
    push = torch.randn(2, heads, dim, generator=generator)
    at = torch.arange(tokens)
    pushed = torch.stack(
        [rotate(push[0].expand(tokens, -1, -1), *shift(rotary, 0 * at, at), False), push[1].expand(tokens, -1, -1)]
    )
    stored = true.clone()
    stored[:, reused] -= pushed[:, reused]
    slots = paged.slots(blocks, at)
    paged.write(layer, *stored, slots)
    carry = CarryOver(job, [(30, 34), (40, 44), (70, 74)], paged)
    moved = []
    for batch in ([*range(5)], [*range(40, 44), *range(30, 34)], [*range(80, 90), *range(70, 74)], [*range(50, 60)]):
        before = torch.stack(paged.read(layer, blocks, tokens))
        carry.begin(np.array(batch))
        carry.move("one", *true[:, batch])
        after = torch.stack(paged.read(layer, blocks, tokens))
        moved.append((before != after).any(dim=(0, 2, 3)).nonzero().flatten().tolist())
    assert moved == [[], [*range(34, 40)], [*range(44, 50), *range(60, 70), *range(74, 80)], []]
    for token in moved[1] + moved[2]:
        assert torch.allclose(after[:, token], true[:, token], atol=1e-5)
