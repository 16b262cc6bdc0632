from types import SimpleNamespace

import pytest

from kvblend_rag.blend.gate import RequestFacts
from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import ConfigError

pytest.importorskip("vllm")

from kvblend_rag.vllm_plugin.request import Ingest, facts, read_wish


def request(parameters=None, **changes):
    fields = {
        "kv_transfer_params": None if parameters is None else {"kvblend": parameters},
        "prompt_token_ids": [1, 2, 3],
        "prompt_embeds": None,
        "mm_features": [],
        "lora_request": None,
        "pooling_params": None,
        "sampling_params": SimpleNamespace(prompt_logprobs=None),
        "resumable": False,
        "skip_reading_prefix_cache": False,
    }
    return SimpleNamespace(**{**fields, **changes})


@pytest.fixture
def config(tmp_path):
    return BlendConfig(store_path=str(tmp_path), selector="first", recompute_ratio=0.3, span_size=8, tenant="a")


def test_without_parameters_the_engines_settings_hold(config):
    wish = read_wish(request(), config)
    assert wish.blend
    assert wish.ingest is None
    assert (wish.recipe.selector, wish.recipe.ratio, wish.recipe.span, wish.tenant) == ("first", 0.3, 8, "a")


def test_parameters_of_another_connector_are_not_ours(config):
    assert read_wish(request(kv_transfer_params={"do_remote_decode": True}), config).blend


def test_a_request_changes_what_it_names(config):
    wish = read_wish(request({"blend": False, "selector": "question", "ratio": 1, "tenant": "b"}), config)
    assert not wish.blend
    assert (wish.recipe.selector, wish.recipe.ratio, wish.recipe.span, wish.tenant) == ("question", 1.0, 8, "b")


def test_the_layers_are_the_engines_or_the_requests(config):
    assert read_wish(request(), config).recipe.layers == "later"
    assert read_wish(request(), config.replace(score_layers="all")).recipe.layers == "all"
    assert read_wish(request({"layers": "middle"}), config).recipe.layers == "middle"


def test_the_next_token_is_compared_where_the_risk_is_judged(config):
    assert not read_wish(request(), config).recipe.watched
    assert read_wish(request({"max_risk": 0.5}), config).recipe.watched
    assert read_wish(request(), config.replace(max_risk=0.5)).recipe.watched
    assert not read_wish(request({"max_risk": 1}), config.replace(max_risk=0.5)).recipe.watched


def test_ingest_is_read(config):
    wish = read_wish(request({"ingest": {"key": "k", "namespace": "n", "start": 256}}), config)
    assert wish.ingest == Ingest("k", "n", 256)


@pytest.mark.parametrize(
    "parameters",
    [
        [],
        "yes",
        {"selectr": "question"},
        {"selector": "no such"},
        {"selector": 5},
        {"ratio": 2},
        {"ratio": float("nan")},
        {"ratio": "0.1"},
        {"span": 0},
        {"layers": "lower"},
        {"blend": "no"},
        {"tenant": None},
        {"tenant": ["a"]},
        {"ingest": {}},
        {"ingest": 5},
        {"ingest": {"key": "k", "namespace": "n"}},
        {"ingest": {"key": "k", "namespace": "n", "start": "0"}},
        {"ingest": {"key": "k", "namespace": "n", "start": -5}},
        {"ingest": {"key": None, "namespace": "n", "start": 0}},
        {"ingest": {"key": "k", "namespace": "n", "start": 0, "more": 1}},
        {"ingest": {"key": "k", "namespace": "n", "start": 0, "permit": "p", "more": 1}},
    ],
    ids=str,
)
def test_whatever_a_client_sends_is_a_reason_and_never_a_crash(config, parameters):
    with pytest.raises(ConfigError):
        read_wish(request(parameters), config)


def test_an_ordinary_request_has_nothing_against_it():
    assert facts(request()) == RequestFacts()


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"prompt_token_ids": None}, {"has_text": False}),
        ({"prompt_embeds": object()}, {"has_text": False}),
        ({"mm_features": [object()]}, {"multimodal": True}),
        ({"lora_request": object()}, {"lora": True}),
        ({"pooling_params": object(), "sampling_params": None}, {"pooling": True}),
        ({"sampling_params": SimpleNamespace(prompt_logprobs=0)}, {"prompt_logprobs": True}),
        ({"resumable": True}, {"resumable": True}),
        ({"skip_reading_prefix_cache": True}, {"skips_prefix_cache": True}),
    ],
    ids=lambda value: next(iter(value)),
)
def test_what_speaks_against_blending(changes, found):
    assert facts(request(**changes)) == RequestFacts(**found)


@pytest.mark.parametrize(
    ("tenant", "salt", "owner"), [("", None, ""), ("", "s", "s"), ("s", "s", "s"), ("s", None, "s"), ("s", "", "s")]
)
def test_a_cache_salt_is_a_tenant(config, tenant, salt, owner):
    assert read_wish(request({"tenant": tenant}, cache_salt=salt), config).tenant == owner


def test_a_cache_salt_beside_another_tenant_is_refused(config):
    with pytest.raises(ConfigError, match="cache_salt"):
        read_wish(request(cache_salt="b"), config)


def test_exact_is_everything_recomputed():
    config = BlendConfig()
    assert config.for_request({"exact": True}).selector == "everything"
    assert config.planner
    assert not config.for_request({"exact": True}).planner
    assert config.for_request({"exact": True, "selector": "none"}).selector == "everything"
    assert config.for_request({"exact": False, "selector": "none"}).selector == "none"
    with pytest.raises(ConfigError, match="must be true or false"):
        config.for_request({"exact": 1})


def test_types_are_resolved_once_and_not_for_every_request(config, monkeypatch):
    """It takes 0.4 ms of the scheduler's thread."""
    read_wish(request({"ratio": 0.5}), config)
    monkeypatch.setattr("kvblend_rag.config.get_type_hints", None)
    assert read_wish(request({"ratio": 0.25}), config).recipe.ratio == 0.25
    assert config.for_request({}) is config
