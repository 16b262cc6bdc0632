import pytest

from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import KVBlendError
from kvblend_rag.quality.arms import DEFAULT, by_context, parse_arm, parse_arms

CONFIG = BlendConfig()


@pytest.mark.parametrize(
    ("text", "options", "context"),
    [
        ("plain", {"blend": False}, None),
        ("reuse", {"selector": "none"}, None),
        ("question:0.15", {"selector": "question", "ratio": 0.15}, None),
        ("question:ratio=0.3", {"selector": "question", "ratio": 0.3}, None),
        ("first:0.1:span=64@header", {"selector": "first", "ratio": 0.1, "span": 64}, "header"),
    ],
)
def test_names(text, options, context):
    arm = parse_arm(text, CONFIG)
    assert (arm.name, dict(arm.options), arm.context) == (text, options, context)
    assert arm.plain == (text == "plain")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("qestion:0.1", "qestion"),
        ("question:2", "recompute_ratio"),
        ("question:0.1:spam=3", "span"),
        ("question:0.1:64", "name=value"),
        ("question:0.1@somewhere", "ingest_context"),
        ("plain@header", "full prefill"),
    ],
)
def test_what_can_not_be_used(text, message):
    with pytest.raises(KVBlendError, match=message):
        parse_arm(text, CONFIG)


def test_plain_comes_first_and_everything_once():
    assert [arm.name for arm in parse_arms(["reuse", "plain", "reuse"], CONFIG)] == ["plain", "reuse"]
    assert all(parse_arms(DEFAULT, CONFIG))


def test_one_engine_a_context():
    arms = parse_arms(["reuse@header", "reuse", "first:0.1@long"], CONFIG)
    groups = {context: [arm.name for arm in several] for context, several in by_context(arms, CONFIG).items()}
    assert groups == {"long": ["plain", "reuse", "first:0.1@long"], "header": ["reuse@header"]}
