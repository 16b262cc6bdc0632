"""An adaptive budget on an engine: it spends what covers the score, and gives up where that is nearly all."""

import pytest

pytest.importorskip("vllm")

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def rig(rigs):
    return rigs.get("llama", blocks=24, local_device="disk")


@pytest.fixture
def prompt(rig):
    return rig.prompt(200, 150, 100, total=600)


@pytest.mark.parametrize("selector", ["question", "deviation"])
def test_more_coverage_costs_more_and_leaves_less(rig, prompt, selector):
    spent, left = [], []
    for coverage in (0.2, 0.5, 0.8):
        (answer,) = rig.fresh([prompt], count=1, selector=selector, ratio=1.0, span=8, coverage=coverage)
        assert answer.report.blended
        assert answer.report.uncovered_mass <= 1 - coverage + 1e-3
        spent.append(answer.report.recomputed_share)
        left.append(answer.report.uncovered_mass)
    assert 0 < spent[0] < spent[1] < spent[2] < 1
    assert left[0] > left[1] > left[2]


def test_the_ratio_bounds_it(rig, prompt):
    (answer,) = rig.fresh([prompt], count=1, ratio=0.1, coverage=0.9)
    assert answer.report.recomputed_share <= 0.1
    assert answer.report.uncovered_mass > 0.1


def test_beyond_the_limit_it_is_a_full_prefill(rig, prompt):
    (answer,) = rig.fresh([prompt], ratio=0.1, coverage=0.9, full_prefill_share=0.3)
    report = answer.report
    assert not report.blended
    assert report.reason.startswith("covering 90% of the score needs more than 30%")
    assert (report.reused_tokens, report.recomputed_tokens, report.computed_tokens) == (0, 0, len(prompt))
    assert answer.difference(rig.plain(prompt)) < TOLERANCE


def test_selectors_without_a_score_take_no_notice(rig, prompt):
    for selector in ("none", "first", "everything"):
        (answer,) = rig.fresh([prompt], count=1, selector=selector, coverage=0.5, full_prefill_share=0.1)
        assert answer.report.blended
        assert answer.report.uncovered_mass is None


def test_the_layers_that_are_looked_at_decide_what_is_recomputed(rig, prompt):
    spans, scored = {}, set()
    for layers in ("later", "all", "upper", "middle"):
        (answer,) = rig.fresh([prompt], count=1, selector="question", ratio=0.3, span=4, layers=layers)
        spans[layers] = answer.report.recomputed_spans
        scored.add(answer.report.scored_tokens)
    assert len(set(spans.values())) > 1
    assert len(scored) == 1
    (again,) = rig.fresh([prompt], count=1, selector="question", ratio=0.3, span=4)
    assert again.report.recomputed_spans == spans["later"]
    # what is blended otherwise does not meet the same blend in the prefix cache
    (other,) = rig.ask([prompt], count=1, selector="question", ratio=0.3, span=4, layers="all")
    assert other.report.blended
    assert other.report.recomputed_spans == spans["all"]
