"""Effort: what a request's recipe makes a worker compute, for whoever predicts it or measures it."""

from __future__ import annotations

from kvblend_rag.blend.cost import Effort, Pace
from kvblend_rag.selectors import get_selector
from kvblend_rag.selectors.base import Evidence
from kvblend_rag.vllm_plugin.metadata import Recipe


def effort_of(recipe: Recipe, pace: Pace | None) -> Effort:
    """What the recipe's selector makes a worker compute; without a pace, at most."""
    selector = get_selector(recipe.selector)
    question, deviation = (1.0, 1.0) if pace is None else (pace.question_share, pace.deviation_share)
    if recipe.watched:
        question = 1.0
    elif pace is not None and recipe.layers == "middle":
        question = pace.middle_share
    return Effort(
        recipe.ratio if selector.share is None else selector.share,
        recipe.span,
        computed_share=question if Evidence.QUESTION_ATTENTION in selector.needs else 0.0,
        whole_share=deviation if Evidence.DEVIATION in selector.needs else 0.0,
    )


__all__ = ["effort_of"]
