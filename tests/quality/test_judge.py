"""A verdict from figures alone; the figures of real engines are in ``tests/equivalence/test_gate.py``."""

import dataclasses

import numpy as np
import pytest

from kvblend_rag.calibration.verdict import Verdict
from kvblend_rag.config import BlendConfig
from kvblend_rag.quality.judge import Limits, decided, judge, promising
from kvblend_rag.quality.measurement import Cell, Deviation, Identity, Measurement

QUESTIONS = 40


DEFAULTS = {"coverage": 1.0, "span_size": 16, "score_layers": "later"}


def cell(share, loss, kl, seed=0, **settings):
    draw = np.random.default_rng(seed)
    around = lambda mean: tuple(mean + 0.02 * draw.standard_normal(QUESTIONS))  # noqa: E731
    return Cell(
        settings={"selector": "question" if share else "none", "recompute_ratio": share, **DEFAULTS, **settings},
        recomputed=(share,) * QUESTIONS,
        kl=around(kl),
        loss=around(loss),
        same=(1.0,) * QUESTIONS,
    )


def measured(*, seed=0, dtype="float32", **changes):
    """A sound model that needs a fifth: losses fall with the share."""
    cells = tuple(
        cell(share, loss, kl, seed + number)
        for number, (share, loss, kl) in enumerate([(0, 0.3, 0.7), (0.1, 0.12, 0.4), (0.2, 0.03, 0.2), (0.5, 0.0, 0.1)])
    )
    whole = Measurement(
        identity=Identity(model="m", fingerprint="f", dtype=dtype, context="document", context_digest="d"),
        deviation=Deviation(error=2e-6, noise=1e-6, where="the keys of layer 0", chunks=8),
        noise_kl=(1e-7,) * QUESTIONS,
        exact_kl=(2e-7,) * QUESTIONS,
        blind_kl=(8.0,) * QUESTIONS,
        cells=cells,
    )
    return dataclasses.replace(whole, **changes)


@pytest.mark.parametrize("seed", range(10))
def test_a_sound_model_is_accepted_at_the_smallest_budget_that_will_do(seed):
    verdict = judge(measured(seed=10 * seed))
    assert verdict.accepted
    assert verdict.settings["recompute_ratio"] == 0.2
    assert verdict.measured["questions"] == QUESTIONS
    assert verdict.measured["loss"][1] <= verdict.measured["loss"][0] <= verdict.measured["loss"][2]
    assert "20% of the chunk tokens" in verdict.reason
    assert Verdict.from_dict(verdict.to_dict()) == verdict
    BlendConfig().replace(**verdict.settings)


@pytest.mark.parametrize("error", [0.06, 1.0, float("nan"), float("inf")])
def test_stored_kv_that_is_not_the_models_is_refused_whatever_the_answers(error):
    fault = Deviation(error=error, noise=1e-6, where="the values of layer 3, chunk x", chunks=8)
    verdict = judge(measured(deviation=fault))
    assert not verdict.accepted
    assert not verdict.settings
    assert "the values of layer 3" in verdict.reason


def test_a_noisy_dtype_is_no_fault():
    noisy = Deviation(error=0.08, noise=0.03, where="the keys of layer 30", chunks=8)
    assert judge(measured(dtype="bfloat16", deviation=noisy)).accepted
    routed = Deviation(error=0.08, noise=0.001, moved=0.05, where="the keys of layer 3", chunks=8)
    assert judge(measured(dtype="bfloat16", deviation=routed)).accepted
    assert not judge(measured(dtype="bfloat16", deviation=dataclasses.replace(routed, error=0.11))).accepted


def test_everything_recomputed_must_be_a_full_prefill():
    verdict = judge(measured(exact_kl=(0.05,) * QUESTIONS))
    assert "everything recomputed" in verdict.reason
    assert judge(measured(dtype="bfloat16", exact_kl=(0.01,) * QUESTIONS, noise_kl=(0.003,) * QUESTIONS)).accepted
    assert not judge(measured(exact_kl=(0.01,) * QUESTIONS)).accepted


def test_a_model_that_loses_too_much_is_refused():
    worse = tuple(cell(share, 0.4, 0.7) for share in (0, 0.2, 0.5))
    verdict = judge(measured(cells=worse))
    assert not verdict.accepted
    assert "keeps too little" in verdict.reason


def test_a_model_that_forgets_the_documents_is_refused_though_its_gold_answers_are_as_likely():
    forgetful = tuple(cell(share, 0.0, 1.5) for share in (0, 0.2, 0.5))
    assert "81% of what the documents tell" in judge(measured(cells=forgetful)).reason


def test_where_the_documents_tell_little_a_small_divergence_will_do():
    near, far = (tuple(cell(share, 0.0, kl) for share in (0, 0.2, 0.5)) for kl in (0.03, 0.06))
    known, nothing = ((told,) * QUESTIONS for told in (0.4, 0.1))
    assert judge(measured(cells=near, blind_kl=known)).accepted
    assert judge(measured(cells=far, blind_kl=known)).status == "refused"
    assert judge(measured(cells=near, blind_kl=nothing)).status == "refused"


def test_a_lucky_figure_at_a_small_budget_is_not_chosen():
    lucky = (cell(0, 0.3, 0.7), cell(0.1, 0.0, 0.3), cell(0.2, 0.12, 0.3), cell(0.35, 0.02, 0.2), cell(0.5, 0.01, 0.1))
    assert judge(measured(cells=lucky)).settings["recompute_ratio"] == 0.35


def test_few_questions_decide_nothing():
    """A mean within the limit whose interval is not: neither accepted nor refused, whichever of many looks best."""
    wide = tuple(dataclasses.replace(cell(share, 0, 0.2), loss=(-0.9, 0.9) * 6) for share in (0, 0.2, 0.35, 0.5))
    verdict = judge(measured(cells=wide))
    assert verdict.status == "undecided"
    assert not verdict.accepted
    assert not verdict.settings
    assert "too few to tell" in verdict.reason
    assert Verdict.from_dict(verdict.to_dict()) == verdict


@pytest.mark.parametrize("seed", range(10))
def test_noise_is_rarely_taken_for_quality(seed):
    """Models that lose 0.1 nats, measured on 12 questions as noisy as the reader's: no budget is accepted."""
    draw = np.random.default_rng(seed)
    lossy = tuple(
        dataclasses.replace(cell(share, 0, 0.2), loss=tuple(0.1 + 0.3 * draw.standard_normal(12)))
        for share in (0, 0.1, 0.2, 0.35, 0.5)
    )
    assert not judge(measured(cells=lossy)).accepted


def test_reuse_alone_is_chosen_where_it_will_do():
    assert judge(measured(cells=(cell(0, 0.0, 0.1), cell(0.2, 0.0, 0.05)))).settings["selector"] == "none"


def test_too_dear_a_budget_is_not_chosen():
    dear = (cell(0.2, 0.3, 0.7), cell(0.5, 0.02, 0.1))
    assert judge(measured(cells=dear)).accepted
    assert not judge(measured(cells=dear), Limits(share=0.3)).accepted


VARIED = ({"span_size": 64}, {"score_layers": "all"}, {"score_layers": "upper"}, {"score_layers": "middle"})


def varied(seed, noise=0.05, **better):
    """The sound model, its budget of a fifth tried in other ways whose KL differs by chance, or by what is given."""
    whole = measured(seed=10 * seed)
    (budget,) = (each for each in whole.cells if each.settings["recompute_ratio"] == 0.2)
    draw = np.random.default_rng(seed)
    tried = []
    for settings in VARIED:
        (value,) = settings.values()
        change = better.get(f"{value}" if isinstance(value, str) else f"span_{value}", 0.0)
        kl = np.array(budget.kl) + change + noise * draw.standard_normal(QUESTIONS)
        tried.append(dataclasses.replace(budget, settings={**budget.settings, **settings}, kl=tuple(kl)))
    return dataclasses.replace(whole, variations=tuple(tried))


@pytest.mark.parametrize("seed", range(10))
def test_no_variation_is_picked_for_its_noise(seed):
    """As noisy as single questions are: none of those that cost the same is better, and the cheaper ones are worse."""
    for noise in (0.05, 0.2):
        tried = varied(seed, noise=noise, span_64=0.05, middle=0.05)
        assert judge(tried).settings == judge(measured(seed=10 * seed)).settings


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    ("better", "picked"),
    [
        ({"upper": -0.05, "span_64": -0.02}, {"score_layers": "upper"}),
        ({"span_64": -0.05, "all": -0.02, "middle": 0.1}, {"span_size": 64}),
    ],
)
def test_a_variation_that_is_really_better_is_picked(seed, better, picked):
    verdict = judge(varied(seed, **better))
    assert verdict.settings == {"selector": "question", "recompute_ratio": 0.2, **DEFAULTS, **picked}
    assert "changes KL by -0.0" in verdict.reason
    BlendConfig().replace(**verdict.settings)


def test_of_equals_the_cheaper_is_picked_and_of_worse_none():
    for name, picked in (("span_64", {"span_size": 64}), ("middle", {"score_layers": "middle"})):
        others = dict.fromkeys({"span_64", "all", "upper", "middle"} - {name}, 0.1)
        assert (
            judge(varied(0, noise=1e-4, **others)).settings | picked == judge(varied(0, noise=1e-4, **others)).settings
        )
    dearer = {"span_64": 0.1, "middle": 0.1, "all": -1e-5, "upper": 1e-5}
    assert judge(varied(0, noise=1e-4, **dearer)).settings["score_layers"] == "later"


def test_a_variation_must_pass_itself_and_recompute_no_more():
    better = varied(0, upper=-0.1)
    for changes in ({"loss": (0.3,) * QUESTIONS}, {"recomputed": (0.3,) * QUESTIONS}):
        tried = tuple(dataclasses.replace(each, **changes) for each in better.variations)
        assert judge(dataclasses.replace(better, variations=tried)).settings["score_layers"] == "later"


def test_where_no_budget_passes_a_better_variation_may():
    limits = Limits(loss=-0.01)
    lost = varied(0, upper=-0.1, middle=-0.001)
    gained = tuple(dataclasses.replace(each, loss=(-0.05,) * QUESTIONS) for each in lost.variations)
    assert not judge(lost, limits).accepted
    (nearest,) = (each for each in lost.cells if each.settings["recompute_ratio"] == 0.5)
    assert promising(lost, limits) == nearest
    verdict = judge(dataclasses.replace(lost, cells=lost.cells[:3], variations=gained), limits)
    assert verdict.settings["score_layers"] == "upper"


def test_with_a_fault_nothing_is_worth_trying():
    assert promising(measured(exact_kl=(0.05,) * QUESTIONS), Limits()) is None


def test_without_questions_there_is_no_acceptance():
    nothing = measured(noise_kl=(), exact_kl=(), blind_kl=(), cells=())
    assert "no question" in judge(nothing).reason


def test_more_questions_are_asked_until_wider_intervals_tell_too():
    assert decided(measured(), Limits())
    assert decided(measured(exact_kl=(0.05,) * QUESTIONS), Limits())  # a fault is one, however many were asked
    some = [bound / 1000 for bound in range(1, 100)]
    told = [judge(measured(), Limits(loss=loss)).status for loss in some]
    early = [decided(measured(), Limits(loss=loss)) for loss in some]
    assert "undecided" in told
    assert {status for status, soon in zip(told, early, strict=True) if soon} <= {"accepted", "refused"}
    assert sum(early) < sum(status != "undecided" for status in told)
