import math

import numpy as np
import pytest

from kvblend_rag.quality import bootstrap


def test_a_means_interval_is_the_textbooks():
    values = np.random.default_rng(1).normal(2.0, 1.0, 400)
    interval = bootstrap.mean(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.015)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.015)
    assert bootstrap.mean(values) == interval


def test_intervals_cover_what_they_should():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        interval = bootstrap.mean(rng.exponential(1.0, 80))
        covered += interval.low <= 1.0 <= interval.high
    assert 176 <= covered <= 198  # 95 % of 200, less a little for the skewed values; more would be too wide


def test_a_paired_ratio_is_far_narrower_than_an_unpaired_one():
    rng = np.random.default_rng(3)
    reference = rng.uniform(0, 1, 300)
    values = 0.9 * reference
    paired, shuffled = bootstrap.ratio(values, reference), bootstrap.ratio(rng.permutation(values), reference)
    assert (paired.value, paired.low, paired.high) == pytest.approx((0.9, 0.9, 0.9))
    assert shuffled.high - shuffled.low > 0.05


def test_nothing_to_divide_by():
    interval = bootstrap.ratio(np.ones(5), np.zeros(5))
    assert all(math.isnan(each) for each in (interval.value, interval.low, interval.high))
    assert math.isnan(bootstrap.mean(np.zeros(0)).value)
