"""One engine's part, on a FakeEngine: what fails is told apart by whose fault it is."""

import importlib.util
from pathlib import Path

import pytest
import torch

import kvblend_rag.bulk.worker as worker_module
from kvblend_rag.bulk.feed import DELETE, Entry
from kvblend_rag.bulk.worker import BulkWorker, Outcome, outcome_from, store_identity, table_of
from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import ConfigError, EngineUnavailable, StoreError, StoreFull
from kvblend_rag.store import StoredChunk, open_remote
from kvblend_rag.testing import fake_kvblend

_spec = importlib.util.spec_from_file_location("servers", Path(__file__).parents[1] / "store" / "servers.py")
servers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(servers)
TEXT = "The ferry leaves the northern pier at six in the morning and comes back in the evening of the same day. "


@pytest.fixture
def config(tmp_path):
    return BlendConfig(store_path=str(tmp_path / "store"), model="fake-model")


@pytest.fixture
def handles():
    return []


@pytest.fixture
def make(handles):
    def make(config, **options):
        handles.append(fake_kvblend(store_path=config.store_path, **options))
        return handles[-1]

    return make


@pytest.fixture
def worker(config, make):
    return BulkWorker(config, make, store_identity(config))


def entry(name, text=None, **more):
    return Entry(source=f"f:{name}", id=name, text=TEXT + name if text is None else text, **more)


def test_rows_are_stored_and_those_that_cannot_be_say_why(worker, handles):
    rows = [entry("a"), entry("bad", reason="no JSON"), entry("short", "Too short."), entry("gone", operation=DELETE)]
    outcomes = worker.outcomes([*rows, entry("b")])
    assert [each.entry.id for each in outcomes] == ["a", "bad", "short", "gone", "b"]
    assert [each.entry.reason for each in outcomes][:2] == ["", "no JSON"]
    assert "can't be found again" in outcomes[2].entry.reason
    assert [len(each.keys) for each in outcomes] == [1, 0, 0, 0, 1]
    assert sum(each.computed for each in outcomes) == 2
    assert {each.document_id for each in handles[0].catalogue.documents()} == {"a", "b"}
    again = worker.outcomes([entry("a"), entry("b")])
    assert [each.keys for each in again] == [outcomes[0].keys, outcomes[4].keys]
    assert sum(each.computed for each in again) == 0


def test_deletions_and_bad_rows_start_no_engine(worker, handles):
    worker.outcomes([entry("a", operation=DELETE), entry("b", reason="bad")])
    assert handles == []


def test_another_hosts_store_keeps_no_documents(config, make, handles):
    stranger = BulkWorker(config, make, ("elsewhere", 0, 0))
    (outcome,) = stranger.outcomes([entry("a")])
    assert outcome.keys
    assert handles[0].catalogue.documents() == []
    assert handles[0].catalogue.held(outcome.keys) == set(outcome.keys)


def test_what_another_host_has_computed_is_not_computed_again(config, make, handles, tmp_path):
    """It learns that from the tier they share, before its engine starts."""
    port = servers.free_port()
    with servers.valkey_server(tmp_path / "valkey", port):
        shared = config.replace(remote=(f"redis://127.0.0.1:{port}",))
        with make(config.replace(store_path=str(tmp_path / "elsewhere"))) as other:
            ((key, tokens),) = other.cut(TEXT + "a")
            space = other._ready_ingester().namespace
        (tier,) = open_remote(shared)
        tier.put(StoredChunk(key, space, tokens, torch.zeros(1, 2, len(tokens), 1, 4)))
        worker = BulkWorker(shared, make, ("elsewhere", 0, 0))
        outcomes = worker.outcomes([entry("a"), entry("b")])
        tier.close()
    assert outcomes[0].keys == (key,)
    assert sum(each.computed for each in outcomes) == 1
    assert handles[-1].engine.ingested == 1


def test_a_document_that_kills_the_engine_is_a_dead_letter_and_the_others_are_stored(config, make, handles):
    class Fragile:
        def __init__(self, kv):
            self.kv = kv

        def ingest(self, texts, **options):
            if any("poison" in text for text in texts):
                raise EngineUnavailable("vLLM's engine has died; its log tells why. Make a new one.")
            return self.kv.ingest(texts, **options)

        def __getattr__(self, name):
            return getattr(self.kv, name)

    worker = BulkWorker(config, lambda given: Fragile(make(given)), store_identity(config))
    outcomes = worker.outcomes([entry("a"), entry("p", TEXT + "poison"), entry("b")])
    assert ["has died" in each.entry.reason for each in outcomes] == [False, True, False]
    assert [bool(each.keys) for each in outcomes] == [True, False, True]
    assert len(handles) == 3  # after the batch, and after the document alone
    assert [handle.closed for handle in handles] == [True, True, False]


@pytest.mark.parametrize(
    ("error", "kind"),
    [(EngineUnavailable("no GPU"), "EngineUnavailable"), (ConfigError("no such argument"), "ConfigError")],
)
def test_an_engine_that_does_not_start_ends_the_run(config, error, kind):
    class Broken:
        @property
        def engine(self):
            raise error

        def close(self):
            pass

    outcomes = BulkWorker(config, lambda _: Broken(), store_identity(config)).outcomes([entry("a"), entry("b")])
    assert [each.fatal for each in outcomes] == [kind, kind]
    assert outcomes[0].entry.reason == str(error)


def test_a_refused_model_ends_the_run(config, make):
    worker = BulkWorker(config, lambda given: make(given, refusal="it thinks sideways"), store_identity(config))
    (outcome,) = worker.outcomes([entry("a")])
    assert outcome.fatal == "ConfigError"
    assert "it thinks sideways" in outcome.entry.reason


def test_a_store_that_comes_back_costs_a_pause_and_one_that_is_full_ends_the_run(config, make, monkeypatch):
    waited, errors = [], [StoreError("Valkey is restarting."), StoreError("Valkey is restarting.")]
    monkeypatch.setattr(worker_module.time, "sleep", waited.append)

    def moody(given):
        kv = make(given)
        ingest = kv.ingest

        def ingest_or_not(*arguments, **options):
            if errors:
                raise errors.pop()
            return ingest(*arguments, **options)

        kv.ingest = ingest_or_not
        return kv

    worker = BulkWorker(config, moody, store_identity(config))
    (outcome,) = worker.outcomes([entry("a")])
    assert (outcome.entry.reason, outcome.fatal, bool(outcome.keys)) == ("", "", True)
    assert waited == [1.0, 4.0]
    errors.append(StoreFull("No space is left."))
    (outcome,) = worker.outcomes([entry("b")])
    assert outcome.fatal == "StoreFull"
    errors += [StoreError("gone for good")] * 9
    (outcome,) = worker.outcomes([entry("b")])
    assert outcome.fatal == "StoreError"


def test_outcomes_cross_as_a_table_and_texts_only_with_what_failed():
    outcomes = [
        Outcome(entry=entry("a"), keys=("0" * 32, "1" * 32), computed=2, tokens=40),
        Outcome(entry=entry("b", reason="why"), fatal="StoreFull"),
    ]
    good, bad = (outcome_from(row) for row in table_of(outcomes).to_pylist())
    assert (good.keys, good.computed, good.tokens, good.entry.text) == (outcomes[0].keys, 2, 40, "")
    assert good.digest == outcomes[0].entry.digest
    assert bad.entry == outcomes[1].entry
    assert bad.fatal == "StoreFull"
    assert table_of([]).schema == table_of(outcomes).schema
