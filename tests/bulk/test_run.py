"""A data set through real Ray Data on this machine, into a real store, with engines that have no model."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from kvblend_rag.bulk.data_set import DataSet
from kvblend_rag.bulk.feed import Columns
from kvblend_rag.bulk.run import Fleet, ingest
from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import ConfigError, StoreError
from kvblend_rag.testing import fake_kvblend

pytestmark = pytest.mark.full

TEXT = "The ferry leaves the northern pier at six in the morning and comes back in the evening of the same day. "
FLEET = Fleet(engines=2, batch=4)


@pytest.fixture(scope="module", autouse=True)
def _ray():
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield
    ray.shutdown()


@pytest.fixture
def config(tmp_path):
    return BlendConfig(store_path=str(tmp_path / "store"), model="fake-model")


@pytest.fixture
def run(config, tmp_path):
    """A data set into the store; where it ends, and the dead letters."""

    def run(location, *, names=None, format=None, stop_after=None, **options):
        letters = tmp_path / "dead.jsonl"
        make = options.get("make") or (lambda given: fake_kvblend(store_path=given.store_path))
        data_set = DataSet.at(str(location), names or Columns(), format)
        steps = ingest(data_set, config, options.get("fleet", FLEET), letters, make)
        for at in steps:
            if stop_after is not None and at.rows >= stop_after:
                steps.close()
                break
        return at, [json.loads(line) for line in letters.read_text().splitlines()] if letters.exists() else []

    return run


@pytest.fixture
def held(config):
    """How many chunks each document holds."""

    def held():
        with fake_kvblend(store_path=config.store_path) as kv:
            return {each.document_id: each.chunks for each in kv.catalogue.documents()}

    return held


def rows(*names, **more):
    return [{"id": name, "text": f"{TEXT}{name}", **more} for name in names]


def write(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_json_lines_with_updates_deletions_and_dead_letters(run, held, tmp_path):
    names = [f"d{number}" for number in range(12)]
    first, letters = run(write(tmp_path / "a.jsonl", rows(*names)))
    assert (first.stored, first.deleted, first.failed, first.computed) == (12, 0, 0, 12)
    assert letters == []
    assert held() == dict.fromkeys(names, 1)
    feed = [
        *rows("d1", text_is="old"),
        {"id": "d0", "operation": "delete"},
        {"id": "d1", "text": f"{TEXT}edited"},
        "{torn",
        {"id": "short", "text": "Too short."},
        {"id": "d2", "text": "lost", "operation": "merge"},
        *rows("d12", "d13"),
        {"id": "d13", "operation": "delete"},
        {"id": "unknown", "operation": "delete"},
    ]
    second, letters = run(write(tmp_path / "b.jsonl", feed))
    assert second.earlier == 2  # d1 and d13, which later rows replace
    assert (second.stored, second.deleted, second.failed, second.computed) == (2, 3, 3, 2)
    assert second.removed == 2  # of d0, and of d1 as it was
    assert {each["source"].rpartition(":")[2]: each["reason"].split(":")[0] for each in letters} == {
        "4": "the line is not JSON",
        "5": letters[[each["id"] for each in letters].index("short")]["reason"].split(":")[0],
        "6": "the operation 'merge' is unknown",
    }
    assert held() == {**dict.fromkeys(names[1:], 1), "d12": 1}
    # once more: nothing is computed, and nothing changes
    third, _ = run(tmp_path / "b.jsonl")
    assert (third.stored, third.computed, third.removed) == (2, 0, 0)
    assert held() == {**dict.fromkeys(names[1:], 1), "d12": 1}


def test_an_interrupted_run_goes_on_where_it_stopped(run, held, tmp_path):
    names = [f"d{number}" for number in range(30)]
    path = write(tmp_path / "a.jsonl", rows(*names))
    part, _ = run(path, stop_after=8)
    assert 8 <= part.rows < 30
    rest, _ = run(path)
    assert rest.earlier == part.rows
    assert rest.total == rest.stored == 30 - part.rows
    assert held() == dict.fromkeys(names, 1)
    whole, _ = run(path)  # complete: every row is looked at again
    assert (whole.earlier, whole.stored, whole.computed) == (0, 30, 0)


def test_parquet_with_names_of_its_own(run, held, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in (0, 1):
        named = [f"s{shard}-{number}" for number in range(5)]
        table = pa.table({"key": named, "body": [f"{TEXT}{name}" for name in named], "size": list(range(5))})
        pq.write_table(table, folder / f"{shard}.parquet")
    (folder / "README.md").write_text("Not a shard.")
    at, letters = run(folder, names=Columns(id="key", text="body"))
    assert (at.stored, at.failed, letters) == (10, 0, [])
    assert len(held()) == 10
    with pytest.raises(ConfigError, match="has no column 'id'"):
        run(folder)
    (folder / "0.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises((ConfigError, StoreError), match=r"can't be read as parquet|Ray could not go on"):
        run(folder, names=Columns(id="key", text="body"))


def test_a_folder_of_texts_has_the_ids_that_ingest_gives_without_ray(run, held, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.md").write_text(f"# One\n\n{TEXT}\n\n# Two\n\n{TEXT} Two.\n")
    (folder / "b.txt").write_text(TEXT)
    (folder / "c.txt").write_bytes(b"\xff\xfe\xff")
    at, letters = run(folder)
    assert set(held()) == {f"{folder}/a.md#one", f"{folder}/a.md#two", f"{folder}/b.txt"}
    assert at.failed == 1
    assert letters[0]["reason"] == "the file is not UTF-8 text"


def test_gzipped_lines_and_the_same_text_in_two_documents(run, held, tmp_path):
    path = tmp_path / "a.jsonl.gz"
    same = [{"id": name, "text": TEXT} for name in ("one", "two")]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, same)).encode()))
    run(path)
    assert held() == {"one": 1, "two": 1}
    at, _ = run(write(tmp_path / "b.jsonl", [{"id": "one", "operation": "delete"}]))
    assert (at.deleted, at.removed) == (1, 0)  # the other holds it still
    at, _ = run(write(tmp_path / "b.jsonl", [{"id": "two", "operation": "delete"}]))
    assert (at.deleted, at.removed) == (1, 1)


def test_what_ends_a_run_is_said_in_a_sentence_and_the_next_goes_on(run, held, tmp_path):
    def refuse(given):
        return fake_kvblend(store_path=given.store_path, refusal="it thinks sideways")

    path = write(tmp_path / "a.jsonl", rows("a", "b"))
    with pytest.raises(ConfigError, match="it thinks sideways"):
        run(path, make=refuse)

    def crash(given):
        raise RuntimeError("a bug of ours")

    with pytest.raises(StoreError, match="a bug of ours"):
        run(path, make=crash)
    at, _ = run(path)
    assert at.stored == 2
    assert held() == {"a": 1, "b": 1}


def test_an_engine_process_that_is_killed_is_started_again(run, held, tmp_path):
    """Ray restarts the actor and gives it the batch again."""
    mark = tmp_path / "killed"

    def make(given):
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), 9)
        return fake_kvblend(store_path=given.store_path)

    names = [f"d{number}" for number in range(6)]
    at, letters = run(write(tmp_path / "a.jsonl", rows(*names)), make=make, fleet=Fleet(engines=1, batch=4))
    assert mark.exists()
    assert (at.stored, letters) == (6, [])
    assert len(held()) == 6


def test_nothing_that_is_understood(tmp_path):
    for location, why in [
        (tmp_path / "missing", "no data set"),
        (tmp_path, "holds no parquet or jsonl or text files"),
        ("s3://bucket/folder", "give --format"),
    ]:
        with pytest.raises(ConfigError, match=why):
            DataSet.at(str(location), Columns())
    (tmp_path / "a.parquet").touch()
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(ConfigError, match="parquet and jsonl files"):
        DataSet.at(str(tmp_path), Columns())
    assert DataSet.at(str(tmp_path), Columns(), "jsonl").paths == (str(Path(tmp_path / "b.jsonl").resolve()),)
