"""The routes over a FakeEngine and a real store: what they do, and what they answer to nonsense."""

from __future__ import annotations

import string
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvblend_rag.serving.routes import PREFIX, router
from kvblend_rag.serving.service import Service
from kvblend_rag.testing import fake_kvblend

TEXTS = {f"d{i}": " ".join(f"word{i}x{j}" for j in range(40)) for i in range(4)}


class Served:
    """An app with the routes, and a client in front of it."""

    def __init__(self, folder: Path, **engine) -> None:
        self.folder = folder
        self.kv = fake_kvblend(store_path=folder / "store", **engine)
        self.app = FastAPI()
        self.app.include_router(router)
        self.app.state.kvblend = Service(self.kv, "fake")
        self.client = TestClient(self.app, raise_server_exceptions=False)

    def get(self, path, **params):
        return self.client.get(PREFIX + path, params=params)

    def post(self, path, **body):
        return self.client.post(PREFIX + path, json=body)

    def done(self, answer):
        """The job of an ingest, when it has ended."""
        assert answer.status_code == 202, answer.text
        job = answer.json()
        end = time.monotonic() + 60
        while job["state"] in ("waiting", "running") and time.monotonic() < end:
            time.sleep(0.01)
            job = self.get(f"/jobs/{job['id']}").json()
        return job

    def ingest(self, **more):
        return self.done(
            self.post("/documents", documents=[{"id": name, "text": text} for name, text in TEXTS.items()], **more)
        )


@pytest.fixture
def served(tmp_path):
    made = Served(tmp_path)
    with made.client:
        yield made
    made.kv.close()


def test_documents_come_and_go(served):
    job = served.ingest()
    assert (job["state"], job["documents_done"], job["computed"], job["present"]) == ("done", 4, 4, 0)
    again = served.ingest()
    assert (again["computed"], again["present"]) == (0, 4)
    stats = served.get("/stats").json()
    assert (stats["chunks"], stats["documents"], stats["jobs"]) == (4, 4, 0)
    assert served.post("/prefetch", texts=[TEXTS["d0"], "never ingested " * 20]).json() == {"chunks": 1}
    assert served.post("/prefetch", documents=["d1", "d2", "nobody"]).json() == {"chunks": 2}
    assert served.post("/documents/delete", ids=["d0", "nobody"]).json() == {"chunks": 1}
    assert served.get("/stats").json()["chunks"] == 3


def test_token_ids_groups_and_texts_of_one_document(served):
    ids = served.kv.engine.tokenizer.encode(TEXTS["d0"])
    parts = [{"id": "one", "text": TEXTS[name], "groups": ["books"]} for name in ("d1", "d2")]
    job = served.done(served.post("/documents", documents=[*parts, {"id": "two", "token_ids": ids}]))
    assert job["computed"] == 3
    asked = served.post("/documents/members", ids=["one", "two"], groups=["books"]).json()
    assert asked["members"] == ["one"]
    assert {name: len(keys) for name, keys in asked["chunks"].items()} == {"one": 2, "two": 1}
    assert served.post("/documents/delete", groups=["books"]).json() == {"chunks": 2}


def test_a_replaced_document_lets_its_old_chunks_go(served):
    served.done(served.post("/documents", documents=[{"id": "d", "text": TEXTS["d0"]}]))
    served.done(served.post("/documents", documents=[{"id": "d", "text": TEXTS["d1"]}], replace=False))
    assert served.get("/stats").json()["chunks"] == 2
    served.done(served.post("/documents", documents=[{"id": "d", "text": TEXTS["d2"]}]))
    assert served.get("/stats").json()["chunks"] == 1


def test_what_is_too_short_is_told_and_the_rest_is_stored(served):
    documents = [{"id": "short", "text": "two words"}, {"id": "d0", "text": TEXTS["d0"]}]
    job = served.done(served.post("/documents", documents=documents))
    assert (job["state"], job["computed"]) == ("done", 1)
    assert [each["id"] for each in job["skipped"]] == ["short"]
    assert "can't be found again" in job["skipped"][0]["reason"]


def test_tenants_see_nothing_of_each_other(served):
    assert served.ingest(tenant="one")["computed"] == 4
    assert served.get("/stats", tenant="two").json()["documents"] == 0
    keys = served.post("/documents/members", ids=["d0"], tenant="one").json()["chunks"]["d0"]
    other = served.post("/documents/members", ids=["d0"], missing=keys, tenant="two").json()
    assert (other["chunks"], other["missing"]) == ({}, keys)
    assert served.post("/prefetch", chunks=keys, tenant="two").json() == {"chunks": 0}
    assert served.post("/prefetch", chunks=keys, tenant="one").json() == {"chunks": 1}
    assert served.post("/documents/delete", ids=["d0"], tenant="two").json() == {"chunks": 0}
    assert served.ingest(tenant="two")["computed"] == 4  # as long as if nobody had them


def test_a_job_can_be_cancelled_and_an_unknown_one_not(served):
    many = [{"id": f"m{i}", "text": f"{i} {TEXTS['d0']}"} for i in range(300)]
    job = served.post("/documents", documents=many).json()
    assert served.client.delete(f"{PREFIX}/jobs/{job['id']}").json()["state"] == "cancelled"
    job = served.get(f"/jobs/{job['id']}").json()
    assert job["documents_done"] < 300
    answer = served.client.delete(f"{PREFIX}/jobs/nothing")
    assert answer.status_code == 404
    assert "no ingest job" in answer.json()["error"]["message"]


def test_a_queue_that_is_full_says_so(served):
    served.app.state.kvblend.jobs._room = 10
    answer = served.post("/documents", documents=[{"id": f"{i}", "text": TEXTS["d0"]} for i in range(11)])
    assert answer.status_code == 429
    assert answer.json()["error"]["type"] == "QueueFull"


def test_a_report_by_its_id_and_what_runs_here(served):
    served.ingest()
    output = served.kv.engine.run(_asked(served.kv, f"Read: {TEXTS['d1']} And answer."))
    report = served.get(f"/reports/{output.request_id}").json()
    assert report["blended"]
    assert report["reused_tokens"] == output.report.reused_tokens > 0
    assert served.get("/reports/unknown").status_code == 404
    info = served.get("/info").json()
    assert (info["served_as"], info["refusal"]) == ("fake", None)
    assert info["settings"]["chunk_size"] == served.kv.config.chunk_size
    assert not {"store_path", "remote", "encryption_key"} & info["settings"].keys()


async def _asked(kv, prompt):
    async for output in kv.stream(prompt):
        last = output
    return last


def test_a_refused_model_ingests_nothing(tmp_path):
    served = Served(tmp_path, refusal="it has state-space layers, whose state is no KV")
    with served.client:
        answer = served.post("/documents", documents=[{"id": "d", "text": TEXTS["d0"]}])
        assert answer.status_code == 400
        assert "state-space" in answer.json()["error"]["message"]
        assert served.post("/prefetch", texts=[TEXTS["d0"]]).json() == {"chunks": 0}
    served.kv.close()


def test_a_server_without_the_connector_says_so():
    app = FastAPI()
    app.include_router(router)
    app.state.kvblend = "This engine runs without kvblend"
    answer = TestClient(app).get(f"{PREFIX}/stats")
    assert answer.status_code == 503
    assert "without kvblend" in answer.json()["error"]["message"]


def test_an_accident_is_one_sentence(served, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(served.kv.catalogue, "stats", fail)
    answer = served.get("/stats")
    assert answer.status_code == 500
    assert one_sentence(answer)
    assert "secret" not in answer.text


def test_openapi_describes_all_of_it(served):
    paths = served.client.get("/openapi.json").json()["paths"]
    described = {f"{method} {path.removeprefix(PREFIX)}" for path, methods in paths.items() for method in methods}
    assert described == {
        "post /documents",
        "post /documents/delete",
        "post /documents/members",
        "get /jobs/{job_id}",
        "delete /jobs/{job_id}",
        "post /prefetch",
        "get /stats",
        "get /info",
        "get /reports/{request_id}",
    }
    for methods in paths.values():
        for operation in methods.values():
            assert operation["description"]
            assert "schema" in operation["responses"]["400"]["content"]["application/json"]


def one_sentence(answer) -> bool:
    message = answer.json()["error"]["message"]
    return "\n" not in message and "Traceback" not in message and 0 < len(message) < 3000


NASTY = st.sampled_from(["../../../etc/passwd", "/etc/passwd", "..\\x", "a\x00b", "", "%2e%2e", "é" * 2000, "\ud800x"])
TEXT = st.one_of(NASTY, st.text(max_size=60), st.text(string.ascii_lowercase + " ", max_size=400))
SCALAR = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT)
JSON = st.recursive(
    SCALAR, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)), max_leaves=8
)
DOCUMENT = st.one_of(
    st.fixed_dictionaries(
        {},
        optional={
            "id": st.one_of(TEXT, SCALAR),
            "text": st.one_of(TEXT, SCALAR),
            "token_ids": st.one_of(st.lists(st.integers(-5, 2**40), max_size=40), SCALAR),
            "groups": st.one_of(st.lists(TEXT, max_size=3), SCALAR),
        },
    ),
    JSON,
)
BODY = st.one_of(
    st.fixed_dictionaries(
        {},
        optional={
            "documents": st.one_of(st.lists(DOCUMENT, max_size=3), st.lists(TEXT, max_size=3), JSON),
            "ids": st.one_of(st.lists(TEXT, max_size=3), JSON),
            "groups": st.one_of(st.lists(TEXT, max_size=3), JSON),
            "texts": st.one_of(st.lists(TEXT, max_size=3), JSON),
            "chunks": st.one_of(st.lists(TEXT, max_size=3), JSON),
            "missing": st.one_of(st.lists(TEXT, max_size=3), JSON),
            "join": st.one_of(st.lists(st.tuples(TEXT, TEXT), max_size=3), JSON),
            "group_prefix": SCALAR,
            "tenant": st.one_of(TEXT, SCALAR),
            "replace": SCALAR,
        },
    ),
    JSON,
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    made = Served(tmp_path_factory.mktemp("fuzzed"))
    with made.client:
        yield made
    made.kv.close()


def files(folder: Path) -> set[str]:
    return {str(each.relative_to(folder)).split("/")[0] for each in folder.rglob("*")}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["/documents", "/documents/delete", "/documents/members", "/prefetch"]),
    body=BODY,
)
def test_any_body_is_answered_in_one_sentence(fuzzed, path, body):
    import json

    raw = json.dumps(body).encode()
    answer = fuzzed.client.post(PREFIX + path, content=raw, headers={"content-type": "application/json"})
    if answer.status_code >= 400:
        assert answer.status_code in (400, 429), answer.text
        assert one_sentence(answer)
    elif answer.status_code == 202:
        job = fuzzed.done(answer)
        assert job["state"] == "done", job
    assert files(fuzzed.folder) <= {"store"}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=st.sampled_from(["GET", "DELETE", "POST"]),
    where=st.sampled_from(["/jobs/", "/reports/", "/stats?tenant=", "/documents"]),
    what=st.one_of(st.text(string.printable, max_size=80), NASTY.filter(lambda text: "\ud800" not in text)),
    raw=st.binary(max_size=60),
)
def test_any_path_and_any_bytes(fuzzed, method, where, what, raw):
    from urllib.parse import quote

    url = PREFIX + where + (quote(what, safe="") if where != "/documents" else "")
    answer = fuzzed.client.request(method, url, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code < 500, answer.text
    assert "Traceback" not in answer.text
    if answer.status_code == 400:
        assert one_sentence(answer)
    assert files(fuzzed.folder) <= {"store"}
