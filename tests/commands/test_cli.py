"""What needs no engine: help, configuration, the store's upkeep, and errors in one sentence."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml

from kvblend_rag.store import Catalogue, DiskStore, StoredChunk

KEYS = ["0" * 31 + "1", "0" * 31 + "2"]


def one_sentence(error: str) -> bool:
    return len(error.strip().splitlines()) == 1 and "Traceback" not in error


@pytest.fixture
def store(tmp_path):
    """Two chunks, held by one document each."""
    folder = tmp_path / "store"
    catalogue = Catalogue(folder)
    disk = DiskStore(folder, catalogue=catalogue)
    for key, document in zip(KEYS, ("first", "second"), strict=True):
        chunk = StoredChunk(key, "space", np.arange(20, dtype=np.int32), torch.zeros(1, 2, 20, 1, 4))
        catalogue.hold(document, [key])
        disk.put(chunk)
        catalogue.add(key, "space", chunk.token_ids, 0, 1, chunk.kv.nbytes)
    disk.close()
    catalogue.close()
    return folder


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["config"], ["store", "--help"]])
def test_without_an_engine_it_loads_nothing_heavy(arguments):
    code = (
        "import sys\nfrom kvblend_rag.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'vllm', 'transformers'} & sys.modules.keys()"
    )
    ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout


def test_every_verb_has_help(kvblend, capfd):
    for verb in (
        "ingest",
        "ask",
        "demo",
        "verify",
        "calibrate",
        "bench ttft",
        "bench ingest",
        "bench gpu",
        "bench match",
        "store gc",
        "config",
    ):
        with pytest.raises(SystemExit) as end:
            kvblend(*verb.split(), "--help")
        assert end.value.code == 0
        assert "usage: kvblend" in capfd.readouterr().out


def test_a_model_may_stand_behind_calibrate_or_be_an_option():
    from kvblend_rag.cli import _parser

    for arguments in (["calibrate", "m"], ["calibrate", "--model", "m"], ["calibrate", "--count", "3", "m"]):
        assert _parser().parse_args(arguments).model == "m"
    assert _parser().parse_args(["calibrate"]).model is None


def test_what_can_not_be_calibrated(kvblend, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    few = tmp_path / "few"
    few.mkdir()
    (few / "one.md").write_text("# One\n\nOne document alone, of one sentence, from which no questions can be made.")
    for arguments, why in (
        (["--count", "0"], "--count is 0"),
        (["--contexts", "novel"], "must be one of none, bos"),
        (["--docs", str(few)], "there are 1"),
        (["--questions", str(tmp_path / "none.jsonl")], "none.jsonl"),
    ):
        ran = kvblend("calibrate", tmp_path, "--store", tmp_path / "store", *arguments)
        assert ran.returncode == 2
        assert why in ran.stderr
        assert one_sentence(ran.stderr)


def test_config_prints_what_is_in_effect(kvblend, tmp_path, monkeypatch):
    file = tmp_path / "kvblend.yaml"
    file.write_text("chunk_size: 128\nselector: first\n")
    monkeypatch.setenv("KVBLEND_CHUNK_SIZE", "64")
    ran = kvblend("config", "--config", file)
    effective = yaml.safe_load(ran.stdout)
    assert (effective["chunk_size"], effective["selector"]) == (64, "first")
    assert str(file) in ran.stdout
    assert "KVBLEND_CHUNK_SIZE" in ran.stdout
    assert json.loads(kvblend("config", "--config", file, "--json").stdout) == effective


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("chunk_sise: 128", "Did you mean 'chunk_size'?"),
        ("chunk_size: many", "must be a whole number"),
        ("recompute_ratio: 1.5", "must lie between 0 and 1"),
        ("local_device: tape", "must be one of cpu, disk"),
        ("- 1", "must hold `key: value` lines"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_bad_configuration_is_one_sentence(kvblend, tmp_path, line, says):
    file = tmp_path / "kvblend.yaml"
    file.write_text(line)
    for verb in (["config"], ["ask", "why?"], ["store", "stats"]):
        ran = kvblend(*verb, "--config", file)
        assert ran.returncode == 2
        assert says in ran.stderr
        assert one_sentence(ran.stderr)


def test_a_configuration_file_that_is_not_there(kvblend, tmp_path):
    ran = kvblend("config", "--config", tmp_path / "none.yaml")
    assert ran.returncode == 2
    assert "can't be read: No such file" in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ingest", "{folder}/none"], "does not exist"),
        (["ingest", "{folder}"], "holds no text"),
        (["demo", "--docs", "{folder}/none"], "does not exist"),
        (["demo", "--questions", "0"], "must be 1 or more"),
        (["ask", "why?", "--store", "{folder}/s", "--model", "{folder}"], "Nothing was ingested into"),
        (["store", "stats", "--store", "{folder}/s"], "There is no store at"),
        (["store", "delete", "--store", "{folder}/s"], "Name the documents"),
        (["bench", "match", "--chunks", "0"], "must be 1 or more"),
        (["bench", "ttft", "--ratio", "2"], "must lie between 0 and 1"),
        (["bench", "gpu", "--shape", "gpt-2"], "must be one of llama-3.1-8b"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(kvblend, tmp_path, arguments, says):
    ran = kvblend(*(each.format(folder=tmp_path) for each in arguments))
    assert ran.returncode == 2
    assert says in ran.stderr
    assert one_sentence(ran.stderr)


def test_a_store_that_cannot_be_written_is_found_before_the_engine_starts(kvblend, tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    in_the_way = tmp_path / "store"
    in_the_way.write_text("")
    for store in (in_the_way, in_the_way / "deeper"):
        ran = kvblend("ingest", tmp_path, "--store", store, "--model", tmp_path)
        assert ran.returncode == 2
        assert "can't be created" in ran.stderr
        assert "choose another store_path" in ran.stderr
        assert one_sentence(ran.stderr)


def test_a_read_only_store_is_one_sentence(kvblend, tmp_path, store):
    (tmp_path / "a.txt").write_text("some text")
    mount = ["mount", "--bind", store, store]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", store], check=True)
        ran = kvblend("ingest", tmp_path, "--store", store, "--model", tmp_path)
    finally:
        subprocess.run(["umount", store], check=True)
    assert ran.returncode == 2
    assert "Read-only file system" in ran.stderr
    assert one_sentence(ran.stderr)


@pytest.mark.parametrize("verb", [["verify"], ["ingest", "{folder}"]])
def test_a_model_that_is_not_there(kvblend, tmp_path, verb):
    (tmp_path / "a.txt").write_text("some text")
    arguments = [each.format(folder=tmp_path) for each in verb]
    ran = kvblend(*arguments, "--model", tmp_path / "none", "--store", tmp_path / "store")
    assert ran.returncode == 2
    assert "There is no model at" in ran.stderr
    assert one_sentence(ran.stderr)


def test_without_vllm_one_sentence_says_what_to_install(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    code = "import sys; sys.modules['vllm'] = None; from kvblend_rag.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["ingest", str(tmp_path), "--model", str(tmp_path), "--store", str(tmp_path / "store")]
    ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "vLLM is not installed: pip install" in ran.stderr
    assert one_sentence(ran.stderr)


def test_warnings_of_ours_are_one_line_each(kvblend, tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xff")
    ran = kvblend("ingest", tmp_path, "--model", tmp_path / "none", "--store", tmp_path / "store")
    assert f"Skipped {tmp_path / 'b.txt'}: it is not UTF-8 text." in ran.stderr.splitlines()


def test_store_stats(kvblend, store):
    ran = kvblend("store", "stats", "--store", store)
    assert ran.returncode == 0
    assert "2 chunks of 40 tokens" in ran.stdout
    assert "first: 1 chunks" in ran.stdout
    result = json.loads(kvblend("store", "stats", "--store", store, "--json").stdout)
    assert result["chunks"] == 2
    assert [each["id"] for each in result["documents"]] == ["first", "second"]


def test_store_check_finds_and_mends(kvblend, store):
    assert kvblend("store", "check", "--store", store).returncode == 0
    (file,) = store.glob(f"chunks/*/{KEYS[0]}*.safetensors")
    damaged = bytearray(file.read_bytes())
    damaged[-3] ^= 1
    file.write_bytes(bytes(damaged))
    ran = kvblend("store", "check", "--store", store)
    assert ran.returncode == 1
    assert "--repair" in ran.stderr
    assert kvblend("store", "check", "--repair", "--store", store).returncode == 0
    assert kvblend("store", "check", "--store", store).returncode == 0


def test_store_gc_to_a_bound(kvblend, store):
    assert kvblend("store", "gc", "--max-gb", -1, "--store", store).returncode == 2
    ran = kvblend("store", "gc", "--max-gb", 0, "--store", store)
    assert ran.returncode == 0
    assert "2 over the bound" in ran.stdout
    assert "0 chunks" in kvblend("store", "stats", "--store", store).stdout


def test_store_delete(kvblend, store):
    ran = kvblend("store", "delete", "third", "--store", store)
    assert ran.returncode == 2
    assert "no document 'third'" in ran.stderr
    assert "deleted 1 chunks" in kvblend("store", "delete", "first", "--store", store).stdout
    assert "1 chunks of 20 tokens" in kvblend("store", "stats", "--store", store).stdout
    (store / "mine.txt").write_text("not ours")
    assert kvblend("store", "delete", "--all", "--store", store).returncode == 0
    assert [path.name for path in store.iterdir()] == ["mine.txt"]


def test_bench_match_writes_json_with_versions_and_machine(kvblend, tmp_path):
    file = tmp_path / "new" / "match.json"
    arguments = ["--chunks", 200, "--prompt-tokens", 2000, "--repeats", 2]
    assert "24 chunks present" in kvblend("bench", "match", *arguments, "--json", file).stdout
    result = json.loads(file.read_text())
    assert result["machine"]["versions"]["python"]
    assert result["machine"]["cores"] >= 1
    assert result["cases"]["none present"]["found"] == 0
    assert json.loads(kvblend("bench", "match", *arguments, "--json").stdout)["settings"]["chunks"] == 200
