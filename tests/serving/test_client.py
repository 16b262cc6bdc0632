"""The client's side of the routes, over HTTP to a FakeEngine and a real store; answers are in test_base_url."""

from __future__ import annotations

import threading
import time

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")
pytest.importorskip("uvicorn")

import uvicorn
from fastapi import FastAPI, Request

from kvblend_rag import KVBlend
from kvblend_rag.conversation.turn import ChatRequest
from kvblend_rag.documents import DocumentSync
from kvblend_rag.errors import ConfigError, EngineUnavailable, StoreError
from kvblend_rag.serving.routes import router
from kvblend_rag.serving.service import Service
from kvblend_rag.shared import release_handle, shared_handle
from kvblend_rag.testing import fake_kvblend

TEXTS = [" ".join(f"word{i}x{j}" for j in range(40)) for i in range(3)]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A handle behind the routes, and its address; ``/tokenize`` is vLLM's."""
    with fake_kvblend(store_path=tmp_path_factory.mktemp("store"), config={"chunk_size": 64}) as kv:
        app = FastAPI()
        app.include_router(router)
        app.state.kvblend = Service(kv, "fake")

        @app.post("/tokenize")
        async def tokenize(request: Request):
            return {"tokens": kv.engine.tokenizer.encode((await request.json())["prompt"])}

        @app.post("/v1/broken")
        async def broken():
            raise ZeroDivisionError

        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield kv, f"http://127.0.0.1:{port}/v1"
        server.should_exit = True
        thread.join()


@pytest.fixture
def kv(served):
    with KVBlend.from_config(base_url=served[1]) as kv:
        yield kv


def test_what_is_done_here_happens_there(served, kv):
    there = served[0]
    report = kv.ingest(TEXTS, document_ids=["a", "b", "c"], progress=False)
    assert (report.computed, report.present, report.skipped) == (3, 0, ())
    assert kv.ingest(TEXTS[:1], document_ids=["a"], progress=False).present == 1
    assert set(there.catalogue.chunks_of(["a", "b", "c"])) == {"a", "b", "c"}
    assert [key for key, _ in kv.cut(TEXTS[0])] == there.catalogue.chunks_of(["a"])["a"]
    assert kv.prefetch(TEXTS[:2]) == 2
    assert kv.prefetch(document_ids=["c"]) == 1
    assert kv.replace([TEXTS[1]], document_ids=["a"], progress=False).present == 1
    assert kv.release(["a", "b", "c"]) == 2
    assert there.catalogue.stats()["chunks"] == 0


def test_texts_are_cut_as_the_server_cuts_them(served, kv):
    long = ". ".join(TEXTS)
    kv.ingest([long], document_ids=["long"], progress=False)
    keys = [key for key, _ in kv.cut(long)]
    assert len(keys) > 1  # the server's chunk_size is not the default
    assert set(keys) == set(served[0].catalogue.chunks_of(["long"])["long"])
    kv.release(["long"])


def test_tenants_and_what_is_skipped(served):
    with KVBlend.from_config(base_url=served[1], tenant="one") as one:
        report = one.ingest([TEXTS[0], "short"], document_ids=["a", "s"], progress=False)
        assert report.computed == 1
        ((index, reason),) = report.skipped
        assert index == 1
        assert "can't be found again" in reason
        assert set(served[0].catalogue.chunks_of(["a"], "one")) == {"a"}
        assert served[0].catalogue.chunks_of(["a"]) == {}
        assert one.release(["a"]) == 1


def test_a_sync_of_documents(kv):
    with DocumentSync(kv, namespace="n") as sync:
        assert sync.add(["a", "b"], TEXTS[:2], groups=["g", "h"]).computed == 2
        assert sync.prefetch(ids=["a"]) == 1
        assert sync.delete(groups=["g"]) == 1
        assert sync.clear() == 1


def test_a_failed_job_is_an_error_of_the_store(served, kv, monkeypatch):
    async def fail(*_, **__):
        raise StoreError("the device is gone.")

    monkeypatch.setattr(type(served[0]), "areplace", fail)
    with pytest.raises(StoreError, match=r"did not store everything: the device is gone\."):
        kv.engine.run(kv.engine.documents.ingest(TEXTS, ["a", "b", "c"], "", replace=True, progress=False))


def test_handles_are_shared_by_address_and_key(served):
    config = KVBlend.from_config(base_url=served[1]).config
    one, two, other = shared_handle(config, "k"), shared_handle(config, "k"), shared_handle(config, "l")
    assert one is two is not other
    assert (release_handle(one), release_handle(two), release_handle(other)) == (False, True, True)


def test_errors_are_one_sentence_each(served, kv):
    with pytest.raises(EngineUnavailable, match="can't be reached"):
        KVBlend.from_config(base_url="http://127.0.0.1:9/v1").engine  # noqa: B018
    with pytest.raises(ConfigError, match="serves fake, not other"):
        KVBlend.from_config(base_url=served[1], model="other").engine  # noqa: B018
    with pytest.raises(ConfigError, match="without kvblend's routes"):
        KVBlend.from_config(base_url=f"{served[1]}/elsewhere").engine  # noqa: B018
    with pytest.raises(ConfigError, match="max_risk is judged beside the engine"):
        kv.engine.watched(None)
    with pytest.raises(ConfigError, match="has its parsers chosen at start"):
        kv.engine.turn(ChatRequest(messages=[{"role": "user", "content": "hi"}], tool_parser="hermes"))
    with pytest.raises(ConfigError, match="takes kvblend_rag's Sampling"):
        kv.engine.generate("hi", object())
    with pytest.raises(ConfigError, match="use its routes"):
        kv.engine.run(kv.engine.call("flush"))
    with pytest.raises(EngineUnavailable, match="failed with status 500"), kv.engine._connection.explained():
        kv.engine._connection.sync.with_options(max_retries=0).post("/broken", cast_to=object)
