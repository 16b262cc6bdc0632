"""The floor of a sweep, and its plot."""

import pytest

from kvblend_rag.commands.bench_gpu_plot import floor_ms, plot_sweep, save_plot
from kvblend_rag.errors import ConfigError


def row(median: float, reused: int = 0, recomputed: int = 0, computed: int = 0) -> dict:
    tokens = {"cached_tokens": 0, "reused_tokens": reused, "recomputed_tokens": recomputed, "computed_tokens": computed}
    return {"median_ms": median, "min_ms": median - 1, "max_ms": median + 1, "tokens": tokens}


@pytest.fixture
def result():
    rows = {
        "plain": row(1000.0, computed=1000),
        "prefix hit": row(10.0, computed=100),
        "first 10%": row(200.0, reused=900, recomputed=90, computed=100),
    }
    return {
        "shape": "llama-3.1-8b",
        "engine": "vLLM",
        "machine": {"gpu": "a GPU"},
        "copy_bytes_per_second": 1e12,
        "sweep": {"1000": rows, "2000": rows},
    }


def test_computing_is_the_floor_where_copying_is_fast(result):
    assert floor_ms(result, result["sweep"]["1000"]) == pytest.approx(90.0)


def test_copying_is_the_floor_where_it_is_slow(result):
    result["copy_bytes_per_second"] = 1e6
    assert floor_ms(result, result["sweep"]["1000"]) == pytest.approx(810 * 131_072 / 1e6 * 1e3)


def test_the_plot_has_a_line_an_arm_and_the_floor(result, tmp_path):
    pytest.importorskip("matplotlib")
    (axes,) = plot_sweep(result).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "floor of first 10%", "plain", "prefix hit", "first 10%",
    ]  # fmt: skip
    save_plot(result, tmp_path / "plots" / "sweep.png")
    assert (tmp_path / "plots" / "sweep.png").stat().st_size > 10_000


def test_without_a_sweep_there_is_nothing_to_plot(result):
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match="--sweep"):
        plot_sweep({**result, "sweep": {}})
