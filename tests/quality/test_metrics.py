import numpy as np
import pytest

from kvblend_rag.quality.metrics import Distribution, exact_match, f1, kl, normalised


def test_squads_normal_form():
    assert normalised("The  Quick, brown-fox!") == "quick brownfox"
    assert normalised("An a THE") == ""


def test_exact_match_takes_any_accepted_answer():
    assert exact_match("the Eiffel Tower.", ["Louvre", "Eiffel tower"]) == 1
    assert exact_match("Eiffel", ["Eiffel tower"]) == 0


@pytest.mark.parametrize(
    ("answer", "accepted", "expected"),
    [
        ("Barack Obama", ["Barack Hussein Obama"], 0.8),
        ("a b b", ["b b b c"], 2 * 2 / (2 + 4)),  # "a" is an article; two of the b are shared
        ("nothing", ["else"], 0.0),
        ("", ["the"], 1.0),
        ("", ["x"], 0.0),
        ("x y", ["x", "x y"], 1.0),
    ],
)
def test_f1(answer, accepted, expected):
    assert f1(answer, accepted) == pytest.approx(expected)


def top(logprobs, k):
    order = np.argsort(-logprobs)[:k]
    return Distribution.of({int(token): float(logprobs[token]) for token in order})


@pytest.mark.parametrize("scale", [0.01, 0.5, 2.0])
def test_kl_is_the_whole_vocabularys_but_for_the_bucket(scale):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, 5000)
    p, q = (x - np.logaddexp.reduce(x) for x in (logits, logits + rng.normal(0, scale, 5000)))
    exact = float(np.sum(np.exp(p) * (p - q)))
    assert kl(top(p, 5000), top(q, 5000)) == pytest.approx(exact, rel=1e-6)
    assert kl(top(p, 2000), top(q, 2000)) <= exact + 1e-9
    assert kl(top(p, 2000), top(q, 2000)) == pytest.approx(exact, rel=0.03, abs=1e-5)
    assert kl(top(p, 50), top(p, 50)) == 0


def test_kl_where_the_other_holds_the_likely_token_for_impossible():
    sure = Distribution.of({1: np.log(0.999), 2: np.log(0.001)})
    elsewhere = Distribution.of({3: np.log(0.999), 4: np.log(0.0005)})
    assert kl(sure, elsewhere) > 5
