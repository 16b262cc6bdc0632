import errno
import os
import subprocess
import threading
import time

import pytest
import torch

from kvblend_rag.errors import ChunkDamaged, ChunkMissing, StoreError, StoreFull
from kvblend_rag.store import Catalogue, DiskStore, StoreLayout

FILE = 1_440  # the size of one of `make`'s files, see test_bounds_below_are_what_they_seem


def flip(path, position=-1):
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


def test_bounds_below_are_what_they_seem(root, make):
    DiskStore(root).put(make(1))
    assert DiskStore(root).nbytes() == FILE


def test_put_get_delete(root, make, same):
    store = DiskStore(root)
    store.put(make(1))
    same(store.read(make(1).key), make(1))
    assert torch.equal(DiskStore(root).get(make(1).key), make(1).kv)
    assert store.contains(make(1).key)
    store.delete([make(1).key, make(2).key])
    assert not store.contains(make(1).key)
    assert store.nbytes() == 0
    with pytest.raises(ChunkMissing):
        store.get(make(1).key)


def test_none_leaves_for_those_that_had_gone_already(root, make):
    store = DiskStore(root, max_bytes=3 * FILE)
    for number in (1, 2, 3):
        store.put(make(number))
    store._usage._due = float("inf")  # what others do is not seen by a scan
    DiskStore(root).delete([make(1).key])
    store.put(make(4))
    assert [store.contains(make(number).key) for number in (1, 2, 3, 4)] == [False, True, True, True]


def test_a_damaged_chunk_is_put_aside_with_its_row(root, make, opened, ingest):
    store, catalogue = opened()
    ingest(store, catalogue, make(1), "doc")
    path = StoreLayout(root).chunk_path(make(1).key, (0, 1))
    flip(path)
    with pytest.raises(ChunkDamaged):
        store.get(make(1).key)
    assert not path.exists()
    assert [file.name.startswith(make(1).key) for file in StoreLayout(root).damaged.iterdir()] == [True]
    assert catalogue.missing([make(1).key]) == [make(1).key]
    with pytest.raises(ChunkMissing):
        store.get(make(1).key)
    ingest(store, catalogue, make(1), "doc")
    assert torch.equal(store.get(make(1).key), make(1).kv)


def test_damaged_files_do_not_pile_up(root, make):
    store = DiskStore(root)
    for number in range(20):
        store.put(make(number))
        flip(StoreLayout(root).chunk_path(make(number).key, (0, 1)))
        with pytest.raises(ChunkDamaged):
            store.get(make(number).key)
    assert len(list(StoreLayout(root).damaged.iterdir())) == 16


def test_a_chunk_renewed_meanwhile_is_not_put_aside(root, make, opened, ingest, monkeypatch):
    store, catalogue = opened()
    ingest(store, catalogue, make(1))
    flip(StoreLayout(root).chunk_path(make(1).key, (0, 1)))
    again = store._read_again

    def renewed_before(key, path, error):
        ingest(*opened(), make(1))
        return again(key, path, error)

    monkeypatch.setattr(store, "_read_again", renewed_before)
    assert torch.equal(store.get(make(1).key), make(1).kv)
    assert catalogue.missing([make(1).key]) == []


def test_a_chunk_deleted_from_outside_loses_its_row(root, make, opened, ingest):
    store, catalogue = opened()
    ingest(store, catalogue, make(1))
    StoreLayout(root).chunk_path(make(1).key, (0, 1)).unlink()
    with pytest.raises(ChunkMissing):
        store.get(make(1).key)
    assert catalogue.missing([make(1).key]) == [make(1).key]


def test_the_least_recently_used_leaves_with_its_row(make, opened, ingest):
    store, catalogue = opened(max_bytes=4 * FILE)
    chunks = [make(number) for number in range(6)]
    for chunk in chunks[:4]:
        ingest(store, catalogue, chunk, "doc")
    store.get(chunks[0].key)
    store.touch(chunks[1].key)
    for chunk in chunks[4:]:
        ingest(store, catalogue, chunk, "doc")
    there = [True, True, False, False, True, True]
    assert [store.contains(chunk.key) for chunk in chunks] == there
    assert catalogue.missing([chunk.key for chunk in chunks]) == [chunks[2].key, chunks[3].key]


def test_the_bound_is_never_passed(make, opened):
    store, _ = opened(max_bytes=5 * FILE)
    for number in range(30):
        store.put(make(number % 11))
        assert store.contains(make(number % 11).key)
        assert store.nbytes() <= 5 * FILE
    assert store.nbytes() > 3 * FILE


def test_all_ranks_of_a_chunk_leave_together(make, opened, ingest):
    ranks = [opened(shard=(rank, 2), max_bytes=4 * FILE) for rank in range(2)]
    for number in range(3):
        for rank, (store, catalogue) in enumerate(ranks):
            ingest(store, catalogue, make(number, rank=rank), "doc", rank, 2)
    assert [[store.contains(make(n).key) for n in range(3)] for store, _ in ranks] == [[False, True, True]] * 2
    assert ranks[0][1].missing([make(n).key for n in range(3)]) == [make(0).key]
    assert torch.equal(ranks[1][0].get(make(2).key), make(2, rank=1).kv)


def test_what_another_process_wrote_counts_too(make, opened, monkeypatch):
    mine, _ = opened(max_bytes=4 * FILE)
    theirs, _ = opened()
    for number in range(8):
        theirs.put(make(number))
    monkeypatch.setattr(mine._usage, "_due", 0.0)
    mine.put(make(9))
    assert mine.nbytes() <= 4 * FILE
    assert mine.contains(make(9).key)


def test_a_file_from_the_future_grows_old(root, make, opened):
    opened()[0].put(make(0))
    future = time.time() + 1e6
    os.utime(StoreLayout(root).chunk_path(make(0).key, (0, 1)), (future, future))
    store, _ = opened(max_bytes=2 * FILE)
    for number in (1, 2):
        time.sleep(0.01)
        store.put(make(number))
    assert [store.contains(make(number).key) for number in range(3)] == [False, True, True]


def test_a_chunk_larger_than_the_store_is_refused(root, make):
    store = DiskStore(root, max_bytes=FILE // 2)
    with pytest.raises(StoreFull, match="max_disk_gb"):
        store.put(make(1))
    assert store.nbytes() == 0


def test_only_unheld_chunks_go(make, opened, ingest):
    store, catalogue = opened()
    ingest(store, catalogue, make(1), "doc")
    ingest(store, catalogue, make(2), "other")
    catalogue.release("other")
    keys = [make(1).key, make(2).key]
    assert store.delete_unheld(keys) == [make(2).key]
    assert [store.contains(key) for key in keys] == [True, False]
    assert catalogue.missing(keys) == [make(2).key]


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
def test_a_failing_write_leaves_nothing_and_says_so(root, make, monkeypatch, call, number):
    store = DiskStore(root)
    store.put(make(1))
    real = getattr(os, call)

    def failing(target, *rest, **options):
        if call != "open" or str(target).endswith(".tmp"):
            raise OSError(number, os.strerror(number), str(target))
        return real(target, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(StoreError) as caught:
            store.put(make(2))
    assert isinstance(caught.value, StoreFull) == (number == errno.ENOSPC)
    assert str(root) in str(caught.value)
    assert "store_path" in str(caught.value) or number == errno.EIO
    assert [path.name for path in StoreLayout(root).chunks.rglob("*.tmp")] == []
    assert not store.contains(make(2).key)
    assert torch.equal(store.get(make(1).key), make(1).kv)


def test_a_disk_that_fills_up_midway(root, make, monkeypatch):
    store = DiskStore(root)
    store.put(make(1))
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, part: write(fd, part[:100]))
    store.put(make(2))  # short writes are not the end
    left = [700]

    def filling(descriptor, part):
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = write(descriptor, part[: left[0]])
        left[0] -= count
        return count

    monkeypatch.setattr(os, "write", filling)
    with pytest.raises(StoreFull, match="No space"):
        store.put(make(1))
    monkeypatch.undo()
    for number in (1, 2):
        assert torch.equal(store.get(make(number).key), make(number).kv)


@pytest.fixture
def small_device(tmp_path):
    folder = tmp_path / "device"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_device_that_is_really_full(small_device, make, ingest):
    catalogue = Catalogue(small_device)
    store = DiskStore(small_device, catalogue=catalogue)
    acknowledged = []

    def fill():
        for number in range(100):
            ingest(store, catalogue, make(number, tokens=512), "doc")
            acknowledged.append(number)

    with pytest.raises(StoreFull, match="No space"):
        fill()
    kept = [make(number, tokens=512) for number in acknowledged]
    assert kept
    assert catalogue.missing([chunk.key for chunk in kept]) == []
    assert all(torch.equal(store.get(chunk.key), chunk.kv) for chunk in kept)
    store.close()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_root_that_can_not_be_made(root, monkeypatch, number):
    def refused(self, *rest, **options):
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr("pathlib.Path.mkdir", refused)
    with pytest.raises(StoreError, match=r"store can't be created .*store_path"):
        DiskStore(root)


def test_a_file_where_the_root_should_be(root):
    root.write_text("")
    with pytest.raises(StoreError, match="in the way"):
        DiskStore(root)


def test_a_read_only_store_is_still_read(root, make, monkeypatch):
    DiskStore(root).put(make(1))
    DiskStore(root).put(make(2))
    flip(StoreLayout(root).chunk_path(make(2).key, (0, 1)))
    store = DiskStore(root)
    real = os.open

    def read_only(path, flags, *rest, **options):
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, flags, *rest, **options)

    def refused(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(os, "utime", refused)
    monkeypatch.setattr(os, "replace", refused)
    assert torch.equal(store.get(make(1).key), make(1).kv)
    with pytest.raises(ChunkDamaged):
        store.get(make(2).key)
    with pytest.raises(StoreError, match="mount it writable"):
        store.put(make(3))


def test_threads_share_a_store(make, opened):
    store, _ = opened(max_bytes=6 * FILE)
    failures = []

    def work(seed):
        for step in range(25):
            number = (seed * 3 + step) % 9
            try:
                store.put(make(number))
                if not torch.equal(store.get(make(number).key), make(number).kv):
                    failures.append("wrong tensor")
            except ChunkMissing:
                pass
            except BaseException as error:
                failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.nbytes() <= 6 * FILE


def test_one_at_a_time_adds_or_removes_files(root, make):
    store = DiskStore(root)
    putting = threading.Thread(target=store.put, args=(make(1),))
    with StoreLayout(root).lock():
        putting.start()
        putting.join(0.3)
        assert putting.is_alive()
        assert not store.contains(make(1).key)
    putting.join()
    assert store.contains(make(1).key)
