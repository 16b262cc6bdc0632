"""Processes that die and processes that share; forked, as importing torch anew takes seconds each."""

import os
import random
import signal
import time

import pytest
import torch

from kvblend_rag.errors import ChunkMissing
from kvblend_rag.store import Catalogue, DiskStore, StoreLayout
from kvblend_rag.store.upkeep import check, gc

SPACE = "model-a"


@pytest.fixture
def fork():
    """Run a function in a child process; it gets a way to report lines, the parent a way to read them."""
    children = []

    def fork(work):
        inlet, outlet = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.close(inlet)
                work(lambda line: os.write(outlet, f"{line}\n".encode()))
                status = 0
            finally:
                os._exit(status)
        os.close(outlet)
        children.append(child)
        return child, inlet

    yield fork
    for child in children:
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def lines(inlet):
    with os.fdopen(inlet) as file:
        return [int(line) for line in file.read().split()]


@pytest.mark.parametrize("seed", range(15))
def test_what_was_acknowledged_survives_kill_9(root, make, ingest, fork, seed):
    def work(report):
        catalogue = Catalogue(root)
        store = DiskStore(root, catalogue=catalogue)
        for number in range(10_000):
            ingest(store, catalogue, make(number % 50, tokens=64), "doc")
            report(number % 50)

    child, inlet = fork(work)
    time.sleep(0.03 + random.Random(seed).random() * 0.25)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    acknowledged = set(lines(inlet))

    catalogue = Catalogue(root)
    store = DiskStore(root, catalogue=catalogue)
    assert catalogue.missing([make(number, tokens=64).key for number in acknowledged]) == []
    expected = {make(number, tokens=64).key: make(number, tokens=64) for number in range(50)}
    for key, token_ids in catalogue.changes_since(0, SPACE).added:
        assert torch.equal(store.get(key), expected[key].kv)
        assert token_ids.tolist() == expected[key].token_ids.tolist()
    result = check(root, repair=True)
    assert result.damaged_files == result.rows_without_file == result.damaged_rows == []
    for temporary in StoreLayout(root).chunks.rglob("*.tmp"):
        os.utime(temporary, (0, 0))
    gc(root)
    assert list(StoreLayout(root).chunks.rglob("*.tmp")) == []
    assert check(root).ok
    store.close()


def test_the_kills_above_hit_writers_at_work(root, make, ingest, fork):
    """The test above must be able to fail: a row before its file is noticed within a few rounds."""

    def work(report):
        catalogue = Catalogue(root)
        store = DiskStore(root, catalogue=catalogue)
        for number in range(10_000):
            chunk = make(number, tokens=64)
            catalogue.add(chunk.key, chunk.namespace, chunk.token_ids, 0, 1, chunk.kv.nbytes)
            store.put(chunk)
            report(number)

    Catalogue(root).close()
    for attempt in range(40):
        child, inlet = fork(work)
        time.sleep(0.05 + 0.007 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(inlet)
        if check(root).rows_without_file:
            return
    pytest.fail("no kill fell between a row and its file")


def test_two_processes_share_a_bounded_store(root, make, fork):
    bound = 8 * 1_440

    def work(report):
        catalogue = Catalogue(root)
        store = DiskStore(root, catalogue=catalogue, max_bytes=bound)
        rng = random.Random(os.getpid())
        for _ in range(80):
            chunk = make(rng.randrange(14))
            if catalogue.missing([chunk.key]):
                store.put(chunk)
                catalogue.add(chunk.key, SPACE, chunk.token_ids, 0, 1, chunk.kv.nbytes)
            try:
                if not torch.equal(store.get(chunk.key), chunk.kv):
                    report(-1)
            except ChunkMissing:
                report(0)
        report(1)

    children = [fork(work) for _ in range(2)]
    for child, inlet in children:
        said = lines(inlet)
        assert os.waitpid(child, 0)[1] == 0
        assert said[-1] == 1
        assert -1 not in said
    result = check(root, repair=True)
    assert result.damaged_files == result.damaged_rows == result.files_without_row == []
    assert check(root).ok
    store = DiskStore(root, max_bytes=bound)
    store.put(make(99))
    assert store.nbytes() <= bound
    assert list(StoreLayout(root).damaged.iterdir()) == []


def test_a_follower_sees_what_another_process_ingests_and_removes(root, make, ingest, fork):
    catalogue = Catalogue(root)
    cursor = catalogue.changes_since(0, SPACE).cursor

    def work(report):
        mine = Catalogue(root)
        store = DiskStore(root, catalogue=mine)
        for number in range(20):
            ingest(store, mine, make(number), "doc")
        store.delete(make(number).key for number in range(0, 20, 2))
        report(1)

    child, inlet = fork(work)
    known, running = set(), True
    while running or catalogue.changed():
        running = running and os.waitpid(child, os.WNOHANG) == (0, 0)
        changes = catalogue.changes_since(cursor, SPACE)
        known = (known - set(changes.removed)) | {key for key, _ in changes.added}
        cursor = changes.cursor
    assert lines(inlet) == [1]
    assert known == {make(number).key for number in range(1, 20, 2)}
    catalogue.close()
