"""The verbs that need an engine, on one shared by all: a tiny random model over a store on a small disk."""

import json
import os
import shutil
from pathlib import Path

import pytest

from kvblend_rag.errors import ChunkRejected, PromptTooLong, StoreFull

TOPICS = ("harbour", "orchard", "library", "foundry", "observatory")
SHORT = ("--max-tokens", 4)
GROUPS = (
    *("real questions", "answers from two chunks", "set: two_chunk"),
    *("kind: lookup", "kind: pronoun", "kind: two_hops"),
)


@pytest.fixture
def folder(tmp_path):
    """Five documents of some 100 tokens each, which no other test has."""
    for number, topic in enumerate(TOPICS):
        lines = [
            f"The {topic} has {number + 2} gates and {day} visitors on day {day} of the month." for day in range(5)
        ]
        (tmp_path / f"{topic}.md").write_text(f"# The {topic}\n\n{tmp_path.name}\n" + " ".join(lines))
    return tmp_path


@pytest.fixture
def ingested(kvblend, shared_engine, folder):
    ran = kvblend("ingest", folder)
    assert ran.returncode == 0, ran.stderr
    return folder


def test_ingest_again_computes_nothing(kvblend, shared_engine, folder):
    assert "5 documents in 5 chunks" in kvblend("ingest", folder).stdout
    assert "0 computed, 5 already stored" in kvblend("ingest", folder).stdout


def test_ingest_follows_edits_and_deletions(kvblend, ingested):
    (ingested / "harbour.md").write_text("# The harbour\n\n" + "The harbour was filled in and is a park now. " * 4)
    (ingested / "orchard.md").unlink()
    ran = kvblend("ingest", ingested)
    assert "4 documents in 4 chunks: 1 computed, 3 already stored" in ran.stdout
    assert "1 documents are no longer there: 1 chunks deleted" in ran.stdout
    sources = json.loads(kvblend("ask", "How many visitors has the orchard?", "-k", 9, *SHORT, "--json").stdout)[0][
        "sources"
    ]
    assert not any(str(ingested / "orchard.md") in each for each in sources)


def test_two_folders_are_found_together(kvblend, ingested, config, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "harbour.md").write_text("# The harbour\n\n" + "Another harbour, with cranes and two tug boats. " * 4)
    assert kvblend("ingest", other).returncode == 0
    (answer,) = json.loads(kvblend("ask", "What has the harbour?", "-k", 50, *SHORT, "--json").stdout)
    assert {str(ingested / "harbour.md#the-harbour"), str(other / "harbour.md#the-harbour")} <= set(answer["sources"])
    kvblend("store", "delete", other / "harbour.md#the-harbour", "--store", config.store_path)
    (answer,) = json.loads(kvblend("ask", "What has the harbour?", "-k", 50, *SHORT, "--json").stdout)
    assert str(other / "harbour.md#the-harbour") not in answer["sources"]


def test_what_is_too_short_is_named_and_the_rest_is_stored(kvblend, shared_engine, folder):
    (folder / "short.md").write_text("# Short\n\nTiny.")
    ran = kvblend("ingest", folder)
    assert ran.returncode == 0
    assert "1 skipped" in ran.stdout
    assert "not precomputed" in ran.stdout
    assert "short.md#short: The chunk has" in ran.stdout


def test_ask_blends_what_was_ingested(kvblend, ingested):
    ran = kvblend("ask", "How many visitors has the foundry?", "-k", 3, *SHORT)
    assert ran.returncode == 0, ran.stderr
    assert "First token after" in ran.stdout
    assert "foundry.md#the-foundry" in ran.stdout
    assert "stored KV, as stored" in ran.stdout
    (answer,) = json.loads(kvblend("ask", "How many gates has the foundry?", "-k", 3, *SHORT, "--json").stdout)
    report = answer["report"]
    assert report["blended"]
    assert len(report["chunks"]) == 3
    groups = ("cached", "reused", "recomputed", "computed")
    assert sum(report[f"{group}_tokens"] for group in groups) == report["prompt_tokens"]


def test_ask_beside_plain_vllm(kvblend, ingested):
    ran = kvblend("ask", "How many gates has the foundry?", "--plain", *SHORT)
    assert "plain vLLM" in ran.stdout
    (answer,) = json.loads(kvblend("ask", "How many gates has the foundry?", "--plain", *SHORT, "--json").stdout)
    assert answer["plain"]["ttft_seconds"] > 0


def test_ask_reads_questions_from_standard_input(kvblend, ingested, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("How many gates has the foundry?\nAnd the library?\n"))
    assert len(json.loads(kvblend("ask", *SHORT, "--json").stdout)) == 2


def test_ask_with_a_prompt_beyond_the_context(kvblend, ingested):
    ran = kvblend("ask", "word " * 3000)
    assert ran.returncode == 2
    assert "context" in ran.stderr
    assert ran.stderr.strip().count("\n") == 0


def test_the_demo_on_a_folder_of_ones_own(kvblend, shared_engine, folder):
    ran = kvblend("demo", "--docs", folder, "--questions", 3, "-k", 3)
    assert ran.returncode == 0, ran.stderr
    assert "What do the documents say about The harbour?" in ran.stdout
    assert "The same answer:" in ran.stdout
    assert "Right:" not in ran.stdout
    assert "Next:" in ran.stdout


def test_the_order_of_the_arms_is_drawn_and_repeats_with_its_seed(kvblend, shared_engine, folder, monkeypatch):
    from kvblend_rag.commands.arms import Arms

    asked, answers, ask = [], [], Arms.ask

    def once(self, prompt, sampling, **options):
        asked.append(options.get("blend", True))
        if not answers:
            answers.append(ask(self, prompt, sampling, **options))
        return answers[0]

    monkeypatch.setattr(Arms, "ask", once)

    def order(seed):
        asked.clear()
        kvblend("demo", "--docs", folder, "--ask", "a?", "--ask", "b?", "--ask", "c?", "--ask", "d?", "--seed", seed)
        return asked[2:]

    first = order(1)
    assert len(first) == 8
    assert first == order(1)
    assert len({tuple(order(seed)) for seed in (1, 2, 3)}) > 1


def test_verify_finds_everything_equal(kvblend, shared_engine, folder, tmp_path_factory):
    file = tmp_path_factory.mktemp("json") / "verify.json"
    ran = kvblend("verify", "--docs", folder, "--lengths", 200, 400, "--json", file)
    assert ran.returncode == 1  # the shared engine keeps chunks in memory, in front of a damaged file
    result = json.loads(file.read_text())
    checks = {each["what"]: each for each in result["checks"]}
    assert checks.pop("with a damaged chunk in the store")["passed"] is False
    assert len(result["checks"]) == 10
    for check in checks.values():
        assert check["passed"], check
        assert check["difference"] <= 1e-4
    assert checks["everything recomputed"]["from_store"] > 200
    assert result["tolerance"] == 1e-4
    assert "Not equal" in ran.stdout


def test_verify_notices_a_wrong_answer(shared_engine, monkeypatch):
    """With approximate KV in place of recomputed, it must not say equal."""
    from kvblend_rag.commands import verify

    ask = verify.Arms.ask

    def approximate(self, prompt, sampling, **blend):
        if blend.get("selector") == "everything":
            blend = {"selector": "none"}
        return ask(self, prompt, sampling, **blend)

    monkeypatch.setattr(verify.Arms, "ask", approximate)
    texts = [f"A text about the {topic}, its gates and its visitors, and what they say. " * 8 for topic in TOPICS]
    result = verify.check(shared_engine, texts, [400])
    (check,) = (each for each in result["checks"] if each["what"] == "everything recomputed")
    assert not check["passed"]
    assert not result["equal"]


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "asked.jsonl"
    texts = [f"The {topic} has {number + 2} gates. " * 8 for number, topic in enumerate(TOPICS)]
    rows = [
        {
            "question": f"How many gates has the {topic}?",
            "answers": [str(number + 2)],
            "chunks": [{"title": topic, "text": text} for topic, text in zip(TOPICS, texts, strict=True)],
        }
        for number, topic in enumerate(TOPICS[:3])
    ]
    rows.append({**rows[0], "chunks": rows[0]["chunks"] * 20})
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_eval(kvblend, shared_engine, questions, tmp_path):
    files = [tmp_path / name for name in ("eval.json", "eval.md", "eval.png")]
    ran = kvblend(
        *("eval", questions, "--two-chunk", 3, "--arms", "everything", "reuse", "first:0.2", "question:0.2"),
        *("--timed", 1, "--batch", 4, "--json", files[0], "--markdown", files[1], "--plot", files[2]),
    )
    assert ran.returncode == 0, ran.stderr
    assert "1 questions did not fit" in ran.stdout
    result = json.loads(files[0].read_text())
    assert result["settings"]["questions"] == len(result["samples"]) == 6
    assert list(result["groups"]) == ["all", *GROUPS]
    rows = result["groups"]["all"]["arms"]
    assert rows["everything"]["same"] == [1, 1, 1]
    assert rows["everything"]["kl"][2] < 1e-6 < rows["reuse"]["kl"][1]
    assert rows["reuse"]["recomputed"][0] == 0
    assert rows["first:0.2"]["blended"][0] == 1
    assert rows["question:0.2"]["kl_share"][0] == pytest.approx(
        rows["question:0.2"]["kl"][0] / rows["first:0.2"]["kl"][0], abs=0.02
    )
    means = [sum(each["arms"]["reuse"]["kl"] for each in result["samples"]) / 6, rows["reuse"]["kl"][0]]
    assert means[0] == pytest.approx(means[1], abs=1e-5)
    assert result["ttft"]["plain"]["speedup"]["median"] == 1
    assert not any(topic in files[0].read_text() for topic in TOPICS)  # no text of the questions
    assert "### set: two_chunk, 3 questions" in files[1].read_text()
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_eval_for_want_of_time(kvblend, shared_engine, tmp_path):
    file = tmp_path / "eval.json"
    ran = kvblend(
        *(
            "eval",
            "--two-chunk",
            2,
            "--aggregate",
            1,
            "--arms",
            "reuse",
            "--batch",
            1,
            "--timed",
            0,
            "--minutes",
            1e-9,
            "--json",
            file,
        )
    )
    assert ran.returncode == 0, ran.stderr
    assert "2 questions were not asked for want of time" in ran.stdout
    result = json.loads(file.read_text())
    assert len(result["samples"]) == result["groups"]["all"]["questions"] == 1
    assert result["ttft"] == {}


def test_eval_of_what_can_not_be_asked(kvblend, shared_engine, questions, tmp_path):
    assert "selector" in kvblend("eval", questions, "--arms", "qestion:0.1").stderr
    assert "no questions" in kvblend("eval").stderr
    assert "--limit is 0" in kvblend("eval", questions, "--limit", 0).stderr
    too_long = tmp_path / "long.jsonl"
    too_long.write_text(questions.read_text().splitlines()[-1])
    ran = kvblend("eval", too_long)
    assert ran.returncode == 2
    assert "fewer --chunks" in ran.stderr


@pytest.mark.parametrize(
    ("given", "kinds"),
    [
        pytest.param(None, {"cloze": 1, "lookup": 1, "two_chunk": 1}, id="made from Fennick's documents"),
        pytest.param("--docs", {"cloze": 1, "lookup": 1, "two_chunk": 1}, id="--docs", marks=pytest.mark.full),
        pytest.param("--questions", {"question": 3}, id="--questions", marks=pytest.mark.full),
    ],
)
def test_calibrate(kvblend, shared_engine, folder, questions, given, kinds):
    file, store = folder / "calibrate.json", Path(shared_engine.kvblend.config.store_path)
    (folder / "mill.md").write_text(
        "# The mill\n\n" + "The mill grinds rye for 14 villages, and closes in August. " * 4
    )
    own = {"--docs": folder, "--questions": questions}
    asked, seen, ingest = [given, own[given]] if given else [], [], shared_engine.kvblend.ingest
    shared_engine.kvblend.ingest = lambda texts, **options: (seen.extend(texts), ingest(texts, **options))[1]
    try:
        ran = kvblend(
            *("calibrate", "--count", 3, "--contexts", "long", "--json", file, *asked),
            *("--arms", "reuse", "question:0.2", "question:0.5:coverage=0.5"),
        )
    finally:
        del shared_engine.kvblend.ingest
    texts = [text for text in seen if isinstance(text, str)]
    assert all(any(topic in text for topic in (*TOPICS, "mill")) for text in texts) == bool(given)
    assert "3 questions" in ran.stdout
    result = json.loads(file.read_text())
    assert result["questions"] == kinds
    found = result["contexts"]["long"]
    cells = found["measurement"]["cells"]
    assert [each["settings"]["selector"] for each in cells] == ["none", "question", "question"]
    tried = [each["settings"] for each in found["measurement"]["variations"]]
    changed = [{"span_size": 64}, {"carry": 0.5}, *({"score_layers": name} for name in ("all", "upper", "middle"))]
    assert tried in ([{**each["settings"], **change} for change in changed] for each in cells[1:])
    assert "spans of 64" in ran.stdout
    assert "carry: 0.5" in ran.stdout
    assert len({tuple(each["kl"]) for each in found["measurement"]["variations"]}) > 1
    assert max(found["measurement"]["exact_kl"]) < 1e-5 < min(found["measurement"]["blind_kl"])
    assert found["measurement"]["deviation"]["error"] < 1e-3
    (verdict,) = store.glob("verdicts/*/long-*.json")
    assert json.loads(verdict.read_text()) == found["verdict"]
    assert verdict.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    accepted = found["verdict"]["status"] == "accepted"
    assert ran.returncode == (0 if accepted else 1)
    assert f"{found['verdict']['status'].capitalize()}: " in ran.stdout
    shutil.rmtree(store / "verdicts")


def test_bench_ttft(kvblend, shared_engine, tmp_path):
    file = tmp_path / "ttft.json"
    ran = kvblend("bench", "ttft", "--prompt-tokens", 600, "--repeats", 2, "--json", file)
    assert ran.returncode == 0, ran.stderr
    assert "nothing matches" in ran.stdout
    result = json.loads(file.read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [
        "plain vLLM",
        "first, 15%",
        "question, 15%",
        "none",
        "plain vLLM, unknown text",
        "nothing matches",
    ]
    assert rows["plain vLLM"]["reused_tokens"] == rows["nothing matches"]["reused_tokens"] == 0
    for name in ("first, 15%", "question, 15%"):
        row = rows[name]
        assert 0.1 < row["recomputed_tokens"] / (row["reused_tokens"] + row["recomputed_tokens"]) <= 0.15
        assert row["bookkeeping_ms"] > 0
    assert result["engine"]["dtype"] == "float32"
    assert result["machine"]["versions"]["torch"]


def test_bench_ttft_beyond_the_context(kvblend, shared_engine):
    ran = kvblend("bench", "ttft", "--prompt-tokens", 9000)
    assert ran.returncode == 2
    assert "does not fit" in ran.stderr


def test_bench_ingest_cleans_up(kvblend, shared_engine, tmp_path):
    file = tmp_path / "ingest.json"
    before = shared_engine.kvblend.catalogue.stats()["documents"]
    assert kvblend("bench", "ingest", "--repeats", 1, "--json", file).returncode == 0
    result = json.loads(file.read_text())
    assert result["settings"]["chunks"] >= 40
    assert result["ingest_over_prefill"]["median"] > 0
    assert shared_engine.kvblend.catalogue.stats()["documents"] == before


def test_chunks_and_prompts_that_cannot_be_used(shared_engine):
    from kvblend_rag import OfflineKVPreCompute

    precompute = OfflineKVPreCompute(shared_engine).precompute_kv
    with pytest.raises(ChunkRejected, match="empty"):
        precompute("  \n")
    with pytest.raises(ChunkRejected, match="fewer than 16"):
        precompute("Too short.")
    with pytest.raises(PromptTooLong, match="2560"):
        shared_engine.generate([[5] * 3000])


def test_a_full_disk_is_one_sentence_and_loses_nothing(kvblend, ingested, shared_engine, small_disk):
    if small_disk is None:
        pytest.skip("this user may not mount a file system")
    ballast = small_disk / "ballast"
    free = os.statvfs(small_disk)
    ballast.write_bytes(bytes(free.f_bavail * free.f_frsize))
    try:
        for number in range(3):
            text = f"Text number {number} finds no room. " * 30
            with pytest.raises(StoreFull, match="No space is left"):
                shared_engine.kvblend.ingest([text], progress=False)
    finally:
        ballast.unlink()
    assert "0 computed, 5 already stored" in kvblend("ingest", ingested).stdout
    (answer,) = json.loads(kvblend("ask", "How many gates has the foundry?", "-k", 3, *SHORT, "--json").stdout)
    assert answer["report"]["blended"]
