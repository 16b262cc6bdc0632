"""Which layers the question's attention is read from, and what that costs."""

from types import SimpleNamespace
from typing import get_args

import pytest

pytest.importorskip("vllm")

from kvblend_rag.blend.cost import ForwardPace, Pace
from kvblend_rag.config import ScoreLayers
from kvblend_rag.selectors.base import Evidence
from kvblend_rag.vllm_plugin.effort import effort_of
from kvblend_rag.vllm_plugin.metadata import Recipe
from kvblend_rag.vllm_plugin.worker.evidence import scored_layers, shares


def layers(count, far_sighted=lambda number: True):
    return [SimpleNamespace(number=number, sees_all=far_sighted(number)) for number in range(count)]


@pytest.mark.parametrize(
    ("choice", "of_thirty", "of_every_other_of_twelve"),
    [
        ("later", range(10, 30), [4, 6, 8, 10]),
        ("all", range(30), [0, 2, 4, 6, 8, 10]),
        ("upper", range(15, 30), [6, 8, 10]),
        ("middle", range(10, 20), [4, 6]),
    ],
)
def test_the_layers_of_each_choice(choice, of_thirty, of_every_other_of_twelve):
    assert [layer.number for layer in scored_layers(layers(30), choice)] == list(of_thirty)
    found = scored_layers(layers(12, lambda number: number % 2 == 0), choice)
    assert [layer.number for layer in found] == of_every_other_of_twelve


@pytest.mark.parametrize("choice", get_args(ScoreLayers))
@pytest.mark.parametrize("count", range(1, 8))
def test_some_layer_is_always_looked_at(choice, count):
    assert scored_layers(layers(count), choice)
    assert scored_layers(layers(count, lambda number: False), choice)


@pytest.mark.parametrize("choice", get_args(ScoreLayers))
def test_the_planner_knows_how_deep_the_scoring_pass_goes(choice):
    paged = SimpleNamespace(layers=layers(30))
    depth = {name: shares(paged, name)[Evidence.QUESTION_ATTENTION] for name in ("later", "middle")}
    pace = Pace(
        ForwardPace(1.0, 1.0),
        0.0,
        0.0,
        1,
        question_share=depth["later"],
        deviation_share=0.1,
        middle_share=depth["middle"],
    )
    effort = effort_of(Recipe("question", 0.2, 16, layers=choice), pace)
    assert effort.computed_share == shares(paged, choice)[Evidence.QUESTION_ATTENTION]
    watched = effort_of(Recipe("question", 0.2, 16, layers=choice, watched=True), pace)
    assert watched.computed_share == 1.0
    assert effort_of(Recipe("first", 0.2, 16, layers=choice, watched=True), pace).computed_share == 0.0
