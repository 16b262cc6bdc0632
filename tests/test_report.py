"""BlendReport: as data, as a line, in a notebook, in a terminal, as a plot."""

import itertools
import json
import pickle
import re
from html.parser import HTMLParser

import pytest

from kvblend_rag import BlendReport
from kvblend_rag.report import ChunkUse

REPORT = BlendReport(
    request_id="7",
    prompt_tokens=100,
    cached_tokens=10,
    reused_tokens=50,
    recomputed_tokens=20,
    computed_tokens=20,
    blended=True,
    selector="question",
    chunks=(ChunkUse(key="a", start=10, tokens=40, tier="memory"), ChunkUse(key="b", start=55, tokens=30, tier="disk")),
    recomputed_spans=((20, 30), (60, 70)),
    milliseconds={"match": 0.5, "load": 2.25},
)
PLAIN = BlendReport(prompt_tokens=8, computed_tokens=8, reason="no <stored> chunk & no reuse")


def test_the_segments_are_the_prompt_and_add_up_to_the_counts():
    segments = REPORT.segments()
    assert segments[0][0] == 0
    assert all(before[1] == after[0] for before, after in itertools.pairwise(segments))
    assert segments[-1][1] == REPORT.prompt_tokens
    for group in ("cached", "reused", "recomputed", "computed"):
        assert sum(stop - start for start, stop, kind in segments if kind == group) == getattr(
            REPORT, f"{group}_tokens"
        )
    assert PLAIN.segments() == [(0, 8, "computed")]
    assert BlendReport().segments() == []


def test_as_data():
    assert BlendReport.from_dict(json.loads(json.dumps(REPORT.to_dict()))) == REPORT
    assert pickle.loads(pickle.dumps(REPORT)) == REPORT


def test_as_a_line():
    assert repr(REPORT) == "<BlendReport 100 prompt tokens: 10 cached, 50 reused, 20 recomputed, 20 computed>"
    assert repr(PLAIN) == "<BlendReport 8 prompt tokens: 8 computed (no <stored> chunk & no reuse)>"


class _Page(HTMLParser):
    """Text, and the styles of elements that hold text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.styles, self.tooltips = [], "", [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.open.append((tag, values.get("style", "")))
        self.tooltips += [values["title"]] if "title" in values else []

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, text):
        self.text += text
        if text.strip() and text.strip() != "■":
            self.styles += [style for _, style in self.open]


def test_in_a_notebook_it_is_whole_escaped_and_takes_the_pages_colours():
    page = _Page(REPORT._repr_html_())
    assert not page.open
    assert len(page.tooltips) == len(REPORT.segments())
    assert re.search(r"100 prompt tokens.*2 stored chunks.*10 cached.*50 reused.*20 recomputed", page.text)
    assert "match 0.5 ms · load 2.2 ms" in page.text
    # Light and dark alike: no text has a colour or a background of its own.
    assert page.styles
    assert not [style for style in page.styles if "color" in style or "background" in style]
    assert "no <stored> chunk & no reuse" in _Page(PLAIN._repr_html_()).text
    assert "<stored>" not in PLAIN._repr_html_()


def test_in_a_terminal():
    from rich.console import Console

    console = Console(record=True, width=100, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(REPORT)
    console.print(PLAIN)
    text = console.export_text()
    assert "2 chunks from disk, memory" in text
    assert "no <stored> chunk & no reuse" in text


def test_as_a_plot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes = REPORT.plot()
    assert isinstance(axes, matplotlib.axes.Axes)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "cached (10)", "reused (50)", "recomputed (20)", "computed (20)"
    ]  # fmt: skip
    assert len(axes.collections) == len(REPORT.segments())
    _, own = plt.subplots()
    assert PLAIN.plot(own) is own
    assert BlendReport().plot()
    plt.close("all")
