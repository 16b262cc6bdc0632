"""Aggregations on the bundled reader: the score's mass is spread wider, and an adaptive budget follows it."""

import numpy as np
import pytest

from kvblend_rag.demo.prompt import SYSTEM_PROMPT
from kvblend_rag.quality.aggregate import AGGREGATE, LOOKUP, aggregate_questions
from kvblend_rag.quality.arms import parse_arms
from kvblend_rag.quality.bootstrap import mean
from kvblend_rag.quality.observe import observe, prepare
from kvblend_rag.quality.prompt import renderer

pytestmark = pytest.mark.full


def test_an_aggregation_gets_a_larger_share_than_a_lookup_over_the_same_documents(reader_llm):
    engine = reader_llm.kvblend.engine
    asked = prepare(engine, aggregate_questions(24, documents=10, seed=5), renderer(engine, SYSTEM_PROMPT))
    name = "question:1.0:coverage=0.7"
    (_, arm) = parse_arms([name], reader_llm.kvblend.config)
    reports = [each.report for each in observe(reader_llm.kvblend, asked, [arm], batch=8, progress=False)[name]]
    assert all(report.blended and report.uncovered_mass <= 0.301 for report in reports)
    shares = {
        kind: np.array(
            [r.recomputed_share for r, each in zip(reports, asked, strict=True) if each.question.kind == kind]
        )
        for kind in (AGGREGATE, LOOKUP)
    }
    more = mean(shares[AGGREGATE] - shares[LOOKUP])
    # a fifth more in the mean, most of it where a count is asked for
    assert 0 < more.low < more.value
