"""Two ranks that share the heads (tensor parallelism), and two that share the layers (pipeline parallelism).

With tensor parallelism each rank stores and loads its own heads; everything recomputed is plain vLLM of as many
ranks, and what one rank lacks makes all of them compute. A pipeline is refused, and answers plainly.
"""

import numpy as np
import pytest
import torch

from kvblend_rag.errors import ConfigError
from kvblend_rag.store import Catalogue
from kvblend_rag.store.chunk_file import read_chunk
from kvblend_rag.store.layout import StoreLayout

pytestmark = pytest.mark.full

TOLERANCE = 1e-4
LENGTHS = (127, 128, 129, 256, 257, 512, 700)
APPROXIMATE = ("none", "first", "deviation", "question")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One store for engines of one rank and of two."""
    return str(tmp_path_factory.mktemp("ranks") / "store")


@pytest.fixture(scope="module", autouse=True)
def _a_core_each():
    """vLLM gives each rank a memory node of its own unless it is told which cores are whose."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        yield


@pytest.fixture(scope="module")
def pair(rigs, store, _a_core_each):
    return rigs.get("llama", blocks=24, local_device="disk", ranks=2, store_path=store)


def prompt_of(rig, total):
    return rig.prompt(100, 60, total=total, seed=total) if total > 200 else rig.prompt(60, total=total, seed=total)


@pytest.mark.parametrize("total", LENGTHS)
def test_everything_recomputed_is_plain_vllm_of_as_many_ranks(pair, total):
    prompt = prompt_of(pair, total)
    (answer,) = pair.fresh([prompt], selector="everything")
    assert answer.report.blended
    assert answer.report.recomputed_tokens >= 60
    assert answer.difference(pair.plain(prompt)) < TOLERANCE


def test_several_requests_at_once(pair):
    prompts = [prompt_of(pair, total) for total in LENGTHS]
    answers = pair.fresh(prompts, selector="everything")
    assert all(answer.report.blended for answer in answers)
    assert max(a.difference(pair.plain(p)) for a, p in zip(answers, prompts, strict=True)) < TOLERANCE


def test_behind_a_prefix_cache_hit(pair):
    prompt = pair.prompt(200, 100, total=620, header=140)
    expected = pair.plain(prompt)
    pair.fresh([prompt[:129]], 1, blend=False)
    (answer,) = pair.ask([prompt], selector="everything")
    assert answer.report.cached_tokens == 128
    assert answer.report.blended
    assert answer.difference(expected) < TOLERANCE


def test_stored_heads_are_exact_where_they_were_computed(pair):
    prompt = [*pair.info.context, *pair.chunks[200], *pair.tokens(40, 5)]
    (answer,) = pair.fresh([prompt], selector="none")
    assert answer.report.reused_tokens == 200
    assert answer.difference(pair.plain(prompt)) < TOLERANCE


@pytest.mark.parametrize("selector", APPROXIMATE)
def test_ranks_recompute_the_same_tokens(pair, selector):
    """They would hang or diverge otherwise; that stored KV is used shows in the difference from plain."""
    prompt = pair.prompt(200, 100, 150, total=620)
    ratio = 0.0 if selector == "none" else 0.2
    first, second = (pair.fresh([prompt], selector=selector, ratio=0.2)[0] for _ in range(2))
    assert first.report.blended
    assert first.report.recomputed_tokens == int(ratio * 450)
    assert first.report.recomputed_spans == second.report.recomputed_spans
    assert first.difference(second) < TOLERANCE
    plain = pair.plain(prompt)
    assert first.token_ids != plain.token_ids or first.difference(plain) > 1e-3


def test_the_next_token_is_compared_over_all_ranks(pair):
    prompt = pair.prompt(200, 100, 150, total=620)
    few, many = (
        pair.fresh([prompt], selector="question", ratio=ratio, max_risk=0.999)[0].report.moved_mass
        for ratio in (0.0, 0.5)
    )
    assert few < 1e-5 < many < 1


def test_each_rank_stores_its_own_heads(pair):
    chunk = pair.chunks[150]
    layout, key = StoreLayout.of(pair.llm.kvblend.config.store_path), pair.key(chunk)
    parts = [read_chunk(layout, layout.chunk_path(key, (rank, 2)), key, (rank, 2)).kv for rank in (0, 1)]
    assert [part.shape for part in parts] == [(4, 2, 150, 1, 32)] * 2
    assert not torch.equal(*parts)
    assert not layout.chunk_path(key, (0, 1)).exists()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("selector", ["none", "question"])
def test_what_one_rank_lacks_makes_all_compute(pair, rank, selector):
    chunk = pair.tokens(150, 4000 + 2 * rank + (selector == "none"))
    prompt = np.concatenate([pair.tokens(20, 1), pair.chunks[60], pair.tokens(9, 2), chunk, pair.tokens(30, 3)])
    pair.store(chunk)
    (whole,) = pair.fresh([prompt], selector=selector)
    assert whole.report.blended
    pair.file(chunk, shard=(rank, 2)).unlink()
    (answer,) = pair.fresh([prompt], selector=selector)
    assert answer.difference(pair.plain(prompt)) < TOLERANCE
    assert not answer.report.blended
    assert "is not in the store" in answer.report.reason  # the rank that lacks it says so, whichever it is
    pair.store(chunk)
    (again,) = pair.fresh([prompt], selector=selector)
    assert again.report.blended
    assert again.difference(whole) < TOLERANCE


def test_a_damaged_part_is_nobodys(pair):
    chunk = pair.tokens(150, 5000)
    prompt = np.concatenate([pair.tokens(20, 1), chunk, pair.tokens(30, 3)])
    pair.store(chunk)
    path = pair.file(chunk, shard=(1, 2))
    raw = bytearray(path.read_bytes())
    raw[3000] ^= 64
    path.write_bytes(raw)
    (answer,) = pair.fresh([prompt], selector="none")
    assert "fails its checksum" in answer.report.reason
    assert answer.difference(pair.plain(prompt)) < TOLERANCE


def test_engines_of_different_ranks_do_not_mix(pair, rigs, store):
    """The last test of this engine: another one, of one rank, takes its place on the same store."""
    prompt, chunk, key = pair.prompt(100, total=300), pair.chunks[100], pair.key(pair.chunks[100])
    before = {path: path.read_bytes() for path in (pair.file(chunk, shard=(rank, 2)) for rank in (0, 1))}
    single = rigs.get("llama", blocks=24, local_device="disk", store_path=store)
    assert single.key(chunk) != key
    (answer,) = single.fresh([prompt], selector="none")
    assert answer.report.reason == "the store holds no chunks for this model and ingest context"
    assert answer.difference(single.plain(prompt)) < TOLERANCE
    single.store(chunk)
    assert single.fresh([prompt], selector="none")[0].report.blended
    assert all(path.read_bytes() == content for path, content in before.items())
    catalogue = Catalogue(store)
    assert catalogue.missing([key, single.key(chunk)]) == []
    catalogue.close()


def test_a_pipeline_is_refused_and_answers_plainly(rigs):
    # compiled: on a CPU vLLM prepares what passes between the stages in the warm-up, which eager engines skip
    rig = rigs.get("llama", compiled=True, stages=2)
    assert rig.info.refusal == "pipeline parallelism is not served yet"
    with pytest.raises(ConfigError, match=r"Chunks can't be precomputed for .*pipeline"):
        rig.llm.kvblend.ingest(["A text that is long enough to be a chunk of its own, if only it could be one."] * 2)
    answers = rig.ask([rig.tokens(300, 1), rig.tokens(40, 2)], selector="everything")
    for answer in answers:
        assert len(answer.token_ids) == 16
        assert answer.report.reason == f"this model can't be blended: {rig.info.refusal}"


def test_ranks_rehearse_together_and_follow_the_planner(rigs):
    """How long a rehearsed pass is, each rank's clock would say otherwise; what is decided by it is decided once."""
    rig = rigs.get("llama", blocks=24, ranks=2, planner=True)
    prompts = [prompt_of(rig, total) for total in LENGTHS[3:]]
    for options in ({"selector": "everything"}, {}, {"selector": "everything", "planner": False}):
        for prompt, answer in zip(prompts, rig.fresh(prompts, **options), strict=True):
            assert answer.report.blended or "ms" in answer.report.reason
            if options or not answer.report.blended:
                assert answer.difference(rig.plain(prompt)) < TOLERANCE
