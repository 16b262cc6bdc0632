import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from kvblend_rag.blend.chunk import chunk_key, model_of, namespace, of_ranks
from kvblend_rag.calibration.verdict import (
    Verdict,
    best_of,
    find_verdict,
    preferred_context,
    read_verdicts,
    write_verdict,
)
from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import ConfigError, StoreError

CONTEXT = (1, 2, 3)
ACCEPTED = Verdict(
    status="accepted",
    reason="0.01 nats a token at 20 %",
    model="tiny",
    fingerprint="abc",
    context="document",
    context_digest=namespace("abc", CONTEXT),
    settings={"selector": "first", "recompute_ratio": 0.2, "coverage": 0.7},
    measured={"recomputed_share": 0.2},
    made="2026-11-24T16:00:00+00:00",
)


@pytest.fixture
def config(tmp_path):
    return BlendConfig(store_path=str(tmp_path))


def test_round_trip(config):
    path = write_verdict(ACCEPTED, config.store_path)
    assert path.parents[2] == Path(config.store_path)
    assert read_verdicts(config.store_path, "abc") == [ACCEPTED]
    assert find_verdict(config, "abc", CONTEXT) == ACCEPTED


def test_a_later_one_takes_its_place(config):
    for status in ("accepted", "refused"):
        write_verdict(dataclasses.replace(ACCEPTED, status=status, settings={}), config.store_path)
    assert [each.status for each in read_verdicts(config.store_path, "abc")] == ["refused"]


@pytest.mark.parametrize(("fingerprint", "context"), [("other", CONTEXT), ("abc", (1, 2)), ("abc", ())])
def test_it_holds_for_its_model_and_context_alone(config, fingerprint, context):
    write_verdict(ACCEPTED, config.store_path)
    assert find_verdict(config, fingerprint, context) is None


@pytest.mark.parametrize(("made", "used"), [(1, 2), (2, 1), (2, 4)])
def test_it_holds_for_any_number_of_ranks_and_chunks_do_not(config, made, used):
    there, here = of_ranks("abc", made), of_ranks("abc", used)
    verdict = dataclasses.replace(ACCEPTED, fingerprint=there, context_digest=namespace(model_of(there), CONTEXT))
    write_verdict(verdict, config.store_path)
    assert find_verdict(config, here, CONTEXT) == verdict
    assert preferred_context(config, here) == "document"
    tokens = np.arange(20, dtype=np.int32)
    assert chunk_key(namespace(there, CONTEXT), tokens) != chunk_key(namespace(here, CONTEXT), tokens)


def test_it_need_not_be_heeded(config):
    write_verdict(ACCEPTED, config.store_path)
    careless = config.replace(heed_verdict=False)
    assert find_verdict(careless, "abc", CONTEXT) is None
    assert preferred_context(careless, "abc") == "long"


def test_its_settings_are_defaults_and_no_more(config):
    applied = ACCEPTED.applied_to(config)
    assert (applied.selector, applied.recompute_ratio, applied.coverage, applied.span_size) == ("first", 0.2, 0.7, 16)
    own = ACCEPTED.applied_to(config.replace(selector="deviation", recompute_ratio=0.4))
    assert (own.selector, own.recompute_ratio, own.coverage) == ("deviation", 0.4, 0.7)


def test_a_verdict_from_before_the_layers_were_a_setting_leaves_them(config):
    assert "score_layers" not in ACCEPTED.settings
    write_verdict(ACCEPTED, config.store_path)
    (old,) = read_verdicts(config.store_path, "abc")
    assert old.applied_to(config).score_layers == "later"
    newer = dataclasses.replace(ACCEPTED, settings={**ACCEPTED.settings, "score_layers": "upper"})
    write_verdict(newer, config.store_path)
    assert read_verdicts(config.store_path, "abc")[0].applied_to(config).score_layers == "upper"


def test_the_context_is_the_best_accepted_ones(config):
    assert preferred_context(config, "abc") == "long"
    write_verdict(ACCEPTED, config.store_path)
    assert preferred_context(config, "abc") == "document"
    cheaper = {"context": "bos", "context_digest": "f" * 32, "measured": {"recomputed_share": 0.1}}
    write_verdict(dataclasses.replace(ACCEPTED, **cheaper), config.store_path)
    free = {"context": "header", "context_digest": "e" * 32, "measured": {"recomputed_share": 0.0}}
    write_verdict(dataclasses.replace(ACCEPTED, status="refused", settings={}, **free), config.store_path)
    assert preferred_context(config, "abc") == "bos"
    assert preferred_context(config.replace(ingest_context="none"), "abc") == "none"
    assert len(read_verdicts(config.store_path, "abc")) == 3


def test_no_verdict_is_best_where_all_refuse():
    assert best_of([]) is None
    assert best_of([dataclasses.replace(ACCEPTED, status="refused")]) is None


@pytest.mark.parametrize(
    "broken",
    [
        "{",
        "[]",
        "{}",
        json.dumps({**ACCEPTED.to_dict(), "format": 99}),
        json.dumps({**ACCEPTED.to_dict(), "status": "perhaps"}),
        json.dumps({**ACCEPTED.to_dict(), "settings": {"recompute_ratio": 7}}),
        json.dumps({**ACCEPTED.to_dict(), "settings": {"model": "other"}}),
        json.dumps({**ACCEPTED.to_dict(), "context": "novel"}),
        json.dumps({**ACCEPTED.to_dict(), "more": 1}),
    ],
    ids=["no JSON", "list", "empty", "format", "status", "ratio", "setting", "context", "more"],
)
def test_a_broken_file_is_an_error_that_names_it(config, broken):
    path = write_verdict(ACCEPTED, config.store_path)
    path.write_text(broken)
    with pytest.raises(ConfigError, match=re.escape(str(path)) + ".*calibrate"):
        find_verdict(config, "abc", CONTEXT)


def test_where_it_can_not_be_written(tmp_path):
    (tmp_path / "verdicts").write_text("in the way")
    with pytest.raises(StoreError, match="can't be written"):
        write_verdict(ACCEPTED, tmp_path)
