"""A server as `kvblend serve` starts it, asked by the real clients. The model is tiny and random, so its answers mean
nothing; what is reused of a prompt, and that nothing else changes, does."""

from __future__ import annotations

import contextlib
import time
from collections import Counter

import pytest

pytest.importorskip("vllm")
pytest.importorskip("openai")

import httpx
import openai

from kvblend_rag import KVBlend
from kvblend_rag.store import Catalogue

pytestmark = pytest.mark.timeout(1200)

MODEL = "tiny"

DOCUMENTS = {
    f"d{i}": f"Article {i}. " + " ".join(f"Machine {i}{j} was serviced on day {j} by crew {i}." for j in range(14))
    for i in range(4)
}
QUESTION = "Which crew was it?"


def prompt(start: str, *names: str) -> str:
    return "\n\n".join([start, *(DOCUMENTS[name] for name in names), QUESTION])


@pytest.fixture(scope="session")
def stored(server):
    documents = [{"id": name, "text": text, "groups": ["articles"]} for name, text in DOCUMENTS.items()]
    job = server.ingest(documents=documents)
    assert (job["state"], job["computed"], job["error"]) == ("done", len(DOCUMENTS), None)
    return server


def asked(server, text, **more):
    messages = [{"role": "user", "content": text}]
    return server.openai.chat.completions.create(model=MODEL, messages=messages, max_tokens=6, temperature=0, **more)


def of(answer):
    return answer.model_extra["kv_transfer_params"]["kvblend"]


@contextlib.contextmanager
def counted(server, **expected):
    """So many fallbacks of each reason, and none of another, are shown on ``/metrics`` for what the block asks."""

    def shown():
        kind = "fallbacks "
        return Counter({name.removeprefix(kind): n for name, n in server.metrics().items() if name.startswith(kind)})

    before = shown()
    yield
    end = time.monotonic() + 10
    while (found := shown() - before) != expected and time.monotonic() < end:  # an answer is out before it is counted
        time.sleep(0.1)
    assert found == expected


def test_a_server_in_short(stored):
    """The one test of a real server in the default run."""
    before = stored.metrics()
    report = of(asked(stored, prompt("Read this.", "d2", "d0")))
    assert report["blended"]
    assert len({chunk["key"] for chunk in report["chunks"]}) == 2
    assert stored.routes.get(f"/reports/{report['request_id']}").json() == report
    parts = list(asked(stored, prompt("Read that.", "d1", "d3"), stream=True))
    streamed = stored.routes.get(f"/reports/{parts[0].id}").json()
    assert streamed["blended"]
    assert streamed["reused_tokens"] > streamed["prompt_tokens"] / 2
    after = stored.metrics()
    assert after["requests blended"] == before.get("requests blended", 0) + 2
    assert sum(after[f"hit_tokens {tier}"] for tier in ("memory", "disk") if f"hit_tokens {tier}" in after) > 400
    assert any(after.get(f"load_bytes {tier}", 0) > 1e5 for tier in ("memory", "disk"))
    assert after["gate uncalibrated"] == 1
    assert httpx.get(f"{stored.url}/v1/kvblend/stats").status_code == 401
    nonsense = stored.routes.post("/documents", json={"documents": [{"id": "x"}]})
    assert nonsense.status_code == 400
    assert nonsense.json()["error"]["message"] == "documents.0: a document holds either `text` or `token_ids`."


@pytest.mark.full
class TestFully:
    """The rest."""

    @pytest.mark.parametrize("stream", [False, True])
    def test_completions(self, stored, stream):
        text = prompt(f"Completion {stream}.", "d0", "d1", "d2")
        answer = stored.openai.completions.create(model=MODEL, prompt=text, max_tokens=6, stream=stream)
        parts = list(answer) if stream else [answer]
        report = stored.routes.get(f"/reports/{parts[0].id}").json()
        assert report["blended"]
        assert len(report["chunks"]) == 3
        assert report["reused_tokens"] > report["prompt_tokens"] / 2

    @pytest.mark.parametrize("stream", [False, True])
    def test_responses(self, stored, stream):
        text = prompt(f"Response {stream}.", "d3", "d1")
        answer = stored.openai.responses.create(
            model=MODEL,
            input=text,
            max_output_tokens=8,
            stream=stream,
            extra_body={"kv_transfer_params": {"kvblend": {"ratio": 0.5}}},
        )
        name = [part.response.id for part in answer if hasattr(part, "response")][-1] if stream else answer.id
        report = stored.routes.get(f"/reports/{name}").json()
        assert report["blended"]
        share = report["recomputed_tokens"] / (report["recomputed_tokens"] + report["reused_tokens"])
        assert 0.35 < share < 0.65

    def test_options_of_a_request(self, stored):
        def with_options(start, **options):
            extra = {"kv_transfer_params": {"kvblend": options}}
            return of(asked(stored, prompt(start, "d0", "d3"), extra_body=extra))

        with counted(stored, asked=1):
            off = with_options("Off.", blend=False)
        assert (off["blended"], off["reason"]) == (False, "the request asked for an ordinary prefill")
        none = with_options("None.", selector="none")
        assert none["recomputed_tokens"] == 0 < none["reused_tokens"]
        exact = with_options("Exact.", exact=True)
        assert exact["reused_tokens"] == 0 < exact["recomputed_tokens"]
        with counted(stored, options=1):
            wrong = with_options("Wrong.", ratoi=0.5)
        assert "did you mean 'ratio'?" in wrong["reason"]
        with counted(stored, empty=1):
            other = with_options("Another tenant.", tenant="somebody")
        assert other["reason"] == "the store holds no chunks for this model and ingest context"

    def test_a_fault_is_counted_by_its_reason(self, stored):
        """A chunk that another process has listed in the store, and whose file is gone."""
        text = "Lost. " + " ".join(f"Sheet {j} of the file was mislaid." for j in range(20))
        with KVBlend.from_config(base_url=f"{stored.url}/v1", api_key=stored.key) as kv:
            ((key, token_ids),) = kv.cut(text)
            with contextlib.closing(Catalogue(stored.log.parent / "store")) as catalogue:
                catalogue.add(key, kv.namespace, token_ids, 0, 1, 1)
        with counted(stored, missing=1):
            report = of(asked(stored, f"Find it. {text} And then?"))
        assert "is not in the store" in report["reason"]
        assert stored.metrics()["requests fallback"] >= 1

    def test_exact_is_the_answer_of_plain_vllm(self, stored):
        text = prompt("The very same.", "d2", "d1", "d0")

        def logprobs(**options):
            answer = asked(
                stored,
                text,
                logprobs=True,
                extra_body={"kv_transfer_params": {"kvblend": options}, "cache_salt": options["tenant"]},
            )
            return [(each.token, each.logprob) for each in answer.choices[0].logprobs.content]

        documents = [{"id": name, "text": body} for name, body in DOCUMENTS.items()]
        assert stored.ingest(documents=documents, tenant="exactly")["computed"] == 4
        exact = logprobs(selector="everything", tenant="exactly")
        plain = logprobs(blend=False, tenant="plainly")
        assert [token for token, _ in exact] == [token for token, _ in plain]
        assert max(abs(a - b) for (_, a), (_, b) in zip(exact, plain, strict=True)) < 2e-3

    def test_cache_salt_is_a_tenant(self, stored):
        report = of(asked(stored, prompt("Salted.", "d0", "d1"), extra_body={"cache_salt": "nobody-s"}))
        assert not report["blended"]
        text = prompt("Theirs.", "d2")
        stored.ingest(documents=[{"id": "theirs", "text": DOCUMENTS["d2"]}], tenant="somebody-s")
        assert of(asked(stored, text, extra_body={"cache_salt": "somebody-s"}))["blended"]

    def test_deletion_is_seen_by_the_next_request(self, stored):
        text = "Gone. " + " ".join(f"Item {j} of the list was crossed out." for j in range(20))
        stored.ingest(documents=[{"id": "gone", "text": text, "groups": ["temporary"]}])
        assert of(asked(stored, f"First. {text} And then?"))["blended"]
        assert stored.routes.post("/prefetch", json={"documents": ["gone"]}).json() == {"chunks": 1}
        assert stored.routes.post("/documents/delete", json={"groups": ["temporary"]}).json() == {"chunks": 1}
        assert not of(asked(stored, f"Second. {text} And then?"))["blended"]

    def test_stats_and_info(self, stored):
        stats = stored.routes.get("/stats").json()
        assert stats["chunks"] >= 4
        assert stats["documents"] >= 4
        assert [each["tier"] for each in stats["tiers"]] == ["memory", "disk"]
        info = stored.routes.get("/info").json()
        assert (info["served_as"], info["refusal"]) == (MODEL, None)

    def test_it_is_in_the_servers_openapi(self, stored):
        described = httpx.get(f"{stored.url}/openapi.json", timeout=60).json()
        assert "/v1/kvblend/documents" in described["paths"]
        assert "IngestRequest" in described["components"]["schemas"]

    def test_a_wrong_key_is_refused(self, stored):
        client = openai.OpenAI(base_url=f"{stored.url}/v1", api_key="wrong")
        with pytest.raises(openai.AuthenticationError):
            client.get("/kvblend/info", cast_to=object)

    def test_what_is_seen_again_and_again_is_learned(self, stored):
        text = " ".join(f"Clause {j} binds the parties for {j} years." for j in range(30))
        before = stored.routes.get("/stats").json()["learned"]
        for turn in range(stored.seen_times):
            report = of(asked(stored, f"{'So. ' * (turn + 1)}{text} Turn {turn}?"))
            assert not report["blended"]
        end = time.monotonic() + 60
        while stored.routes.get("/stats").json()["learned"] == before:
            assert time.monotonic() < end, "nothing was learned"
            time.sleep(0.5)
        report = of(asked(stored, f"Now and here, at last. {text} Well?"))
        assert report["blended"]
        assert report["reused_tokens"] > report["prompt_tokens"] / 2
        held = stored.routes.post("/documents/members", json={"ids": ["kvblend:learned"]}).json()["chunks"]
        assert held["kvblend:learned"]
        assert stored.routes.post("/documents/delete", json={"ids": ["kvblend:learned"]}).json()["chunks"] >= 1

    def test_a_request_has_a_span_in_its_callers_trace(self, stored):
        trace = "4bf92f3577b34da6a3ce929d0e0e4736"
        headers = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
        report = of(asked(stored, prompt("Traced.", "d0", "d3"), extra_headers=headers))
        end = time.monotonic() + 30
        found: dict = {}
        while not ("kvblend" in found and len(found) > 1):  # and vLLM's own, in the same trace
            assert time.monotonic() < end, [span.name for span in stored.spans]
            time.sleep(0.2)
            found = {span.name: span for span in stored.spans if span.trace_id.hex() == trace}
        span = found["kvblend"]
        told = {each.key: each.value for each in span.attributes}
        assert told["kvblend.blended"].bool_value
        assert told["kvblend.tokens.reused"].int_value == report["reused_tokens"]
        assert told["gen_ai.request.id"].string_value == report["request_id"]

    def test_the_log_has_no_traceback(self, stored):
        assert "Traceback" not in stored.log.read_text()
