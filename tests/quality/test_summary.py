import numpy as np
import pytest

from kvblend_rag.config import BlendConfig
from kvblend_rag.quality.arms import parse_arms
from kvblend_rag.quality.metrics import Distribution
from kvblend_rag.quality.observe import Observation
from kvblend_rag.quality.questions import Question
from kvblend_rag.quality.score import Sample, score
from kvblend_rag.quality.summary import groups, summarise
from kvblend_rag.quality.two_chunk import two_chunk_questions
from kvblend_rag.report import BlendReport


def question(number=0, name="s", kind="k"):
    return Question(id=str(number), set=name, kind=kind, text="?", answers=("Ada Lovelace",), documents=())


def observation(answer, probability, **report):
    steps = (Distribution.of({1: np.log(probability), 2: np.log(1 - probability)}),)
    return Observation(answer, (float(np.log(probability)),), steps, BlendReport(prompt_tokens=100, **report))


def test_a_blended_answer_against_a_full_prefills():
    plain = observation("Ada Lovelace", 0.5, computed_tokens=90, cached_tokens=10)
    blended = observation(
        "Lovelace",
        0.25,
        blended=True,
        cached_tokens=10,
        reused_tokens=60,
        recomputed_tokens=20,
        computed_tokens=10,
        scored_tokens=9,
    )
    sample = score(question(), blended, plain)
    assert (sample.exact, sample.f1, sample.same) == (0, pytest.approx(2 / 3), 0)
    assert sample.nll == pytest.approx(np.log(4))
    assert sample.kl == pytest.approx(0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75), abs=1e-4)
    assert (sample.recomputed, sample.computed, sample.scored) == (0.25, pytest.approx(30 / 90), 0.1)
    whole = score(question(), plain, plain)
    assert (whole.exact, whole.same, whole.kl, whole.computed, whole.blended) == (1, 1, 0, 1, 0)


def test_groups_are_named_once():
    questions = [question(0, "a", "x"), question(1, "a", "y"), question(2, "b", "z")]
    assert groups(questions) == {
        "all": [0, 1, 2],
        "set: a": [0, 1],
        "set: b": [2],
        "kind: x": [0],
        "kind: y": [1],
    }


def test_made_questions_are_kept_apart():
    several = groups([question(), *two_chunk_questions(6, documents=4)])
    assert several["real questions"] == [0]
    assert several["answers from two chunks"] == [2, 3, 5, 6]
    assert several["set: two_chunk"] == [1, 2, 3, 4, 5, 6]


def samples(**values):
    common = {"exact": 0.0, "same": 0.0, "recomputed": 0.1, "computed": 0.2, "scored": 0.0, "blended": 1.0}
    common |= {"nll": 1.0, "f1": 1.0, "kl": 0.0}
    return [Sample(**{**common, **{name: each[place] for name, each in values.items()}}) for place in range(2)]


def test_changes_are_paired_and_rivals_are_the_best_published_at_the_same_budget():
    arms = parse_arms(["first:0.1", "deviation:0.1", "question:0.1", "question:0.2"], BlendConfig())
    result = summarise(
        [question(0), question(1)],
        arms,
        {
            "plain": samples(nll=[1.0, 3.0], f1=[1.0, 0.5]),
            "first:0.1": samples(kl=[0.4, 0.4]),
            "deviation:0.1": samples(kl=[0.3, 0.5 - 1e-9]),
            "question:0.1": samples(kl=[0.1, 0.2], nll=[1.5, 3.5], f1=[1.0, 0.2]),
            "question:0.2": samples(),
        },
    )
    row = result["all"]["arms"]["question:0.1"]
    assert result["all"]["questions"] == 2
    assert row["nll_change"] == [0.5, 0.5, 0.5]
    assert row["f1_share"][0] == pytest.approx(0.8)
    assert row["kl_share"][0] == pytest.approx(0.15 / 0.4)
    assert "kl_share" not in result["all"]["arms"]["question:0.2"]
    assert "kl_share" not in result["all"]["arms"]["first:0.1"]
    assert "kl_published_share" not in row


def test_selectors_as_published_are_compared_beside_those_behind_the_same_context():
    arms = parse_arms(["first:0.1", "first:0.1@bos", "deviation:0.1@bos", "question:0.1"], BlendConfig())
    result = summarise(
        [question(0), question(1)],
        arms,
        {
            "plain": samples(),
            "first:0.1": samples(kl=[0.2, 0.2]),
            "first:0.1@bos": samples(kl=[0.5, 0.5]),
            "deviation:0.1@bos": samples(kl=[0.4, 0.4]),
            "question:0.1": samples(kl=[0.1, 0.1]),
        },
    )
    row = result["all"]["arms"]["question:0.1"]
    assert row["kl_share"][0] == pytest.approx(0.5)
    assert row["kl_published_share"][0] == pytest.approx(0.25)
