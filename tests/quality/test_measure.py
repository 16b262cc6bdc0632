"""In how many rounds questions are asked; what is measured of a real engine is in ``tests/commands``."""

from types import SimpleNamespace

import numpy as np
import pytest

from kvblend_rag.calibration.risk import Signals
from kvblend_rag.config import BlendConfig
from kvblend_rag.output import CompletionOutput
from kvblend_rag.quality import measure as module
from kvblend_rag.quality.arms import parse_arm
from kvblend_rag.quality.measurement import Deviation, Identity
from kvblend_rag.quality.metrics import Distribution
from kvblend_rag.quality.observe import Asked, Observation
from kvblend_rag.quality.questions import Question
from kvblend_rag.report import BlendReport
from kvblend_rag.testing.script import FakeLogprob


@pytest.fixture
def asking(monkeypatch):
    """Measures so many questions on an engine that answers at once; gives how many were asked in each round."""
    clock, rounds = SimpleNamespace(now=0.0), []
    step = Distribution(np.array([1, 2]), np.log([0.5, 0.4]))

    def observe(kvblend, asked, arms, **_):
        if any(arm.plain for arm in arms) and len(arms) > 1:
            rounds.append(len(asked))
            clock.now += len(asked)
        seen = Observation("yes", (-0.7,), (step,), BlendReport(prompt_tokens=100))
        return {arm.name: [seen] * len(asked) for arm in arms}

    identity = Identity(model="m", fingerprint="f", dtype="float32", context="long", context_digest="d")
    monkeypatch.setattr(module, "observe", observe)
    monkeypatch.setattr(module, "audit", lambda kvblend, documents: Deviation(error=0.0, noise=0.0))
    monkeypatch.setattr(module, "_identity", lambda kvblend: identity)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def ask(count, *, enough, **options):
        monkeypatch.setattr(module, "decided", lambda measured, limits: measured.questions >= enough)
        questions = [Question.made("set", str(n), "lookup", "Where?", "There", ["a", "b"], (0,)) for n in range(count)]
        asked = [Asked(question, [1], [2]) for question in questions]
        kvblend = SimpleNamespace(config=BlendConfig())
        measured, _ = module.measure(kvblend, asked, lambda question: [1], arms=["question:0.2"], **options)
        assert measured.questions == sum(rounds)
        assert {len(cell.kl) for cell in (*measured.cells, *measured.variations)} == {sum(rounds)}
        assert len(measured.noise_kl) == len(measured.blind_kl) == sum(rounds)
        return rounds

    return ask


def test_a_larger_budget_is_the_second_opinion_of_a_smaller_one():
    """Of two answers that say otherwise; where no budget is twice as large there is none."""
    step = Distribution(np.array([1, 2]), np.log([0.5, 0.4]))
    report = BlendReport(prompt_tokens=100, reused_tokens=80, recomputed_tokens=20, blended=True, uncovered_mass=0.5)

    def observed(text, token):
        listed = [{token: FakeLogprob(logprob=float(np.log(0.8)), rank=1, decoded_token=text)}]
        completion = CompletionOutput(index=0, text=text, token_ids=(token,), logprobs=listed)
        return Observation(text, (-0.7,), (step,), report, Signals.before_the_answer(report), completion)

    names = ["reuse", "question:0.1", "question:0.2", "question:0.3", "question:0.5:coverage=0.5"]
    ways = [parse_arm(name, BlendConfig()) for name in names]
    said = {name: [observed("no", 7)] for name in names} | {"question:0.2": [observed("yes", 9)]}
    said["plain"] = [observed("yes", 9)]
    question = Question.made("set", "0", "lookup", "Where?", "There", ["a", "b"], (0,))
    rows = module._judged(ways, BlendConfig(), [question], said)
    assert [each.differs for each in rows] == [True, True, False, True, True]
    assert [each.signals.disputed for each in rows] == [None, pytest.approx(0.875), None, None, None]
    assert [each.signals.disputed_early for each in rows] == [None, pytest.approx(0.875), None, None, None]


def test_as_many_again_are_asked_until_there_is_a_verdict(asking):
    assert asking(100, enough=40, first=12) == [12, 12, 24]


def test_no_more_than_there_are(asking):
    assert asking(30, enough=1000, first=12) == [12, 12, 6]


def test_no_more_than_there_is_time_for(asking):
    assert asking(100, enough=1000, first=12, seconds=30) == [12, 12]


def test_the_first_are_asked_however_little_time_there_is(asking):
    assert asking(100, enough=1000, first=12, seconds=1) == [12]


def test_all_at_once_where_it_is_not_said_how_many_first(asking):
    assert asking(30, enough=1000) == [30]
