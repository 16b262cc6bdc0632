"""The remote tiers against real servers, good and bad."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from kvblend_rag.address import RemoteAddress, without_password
from kvblend_rag.blend.chunk import namespace
from kvblend_rag.cli import main
from kvblend_rag.commands.torture_kill import make as make_tortured
from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import ChunkDamaged, ChunkMissing, ConfigError, StoreError, StoreFull, StoreUnreachable
from kvblend_rag.store import MemoryStore, TieredStore, open_catalogue, open_remote, open_store, upkeep
from kvblend_rag.store import remote as remote_module
from kvblend_rag.store import s3 as s3_module
from kvblend_rag.store.remote import WORD_KEPT_S
from kvblend_rag.store.sync import SyncResult, sync

FILE = 1_440  # the size of one of `make`'s files, see test_disk
GIB = 1 << 30


def overwrite(store, key, change):
    """Change the stored bytes of a chunk behind the tier's back."""
    data = change(bytearray(store._fetch(key, (0, 1))))
    if store.name == "valkey":
        store._client.set(store._key(key, (0, 1)), bytes(data))
    else:
        store._client.put(store._object(key, (0, 1)), bytes(data))


def test_put_read_delete(remote, make, same):
    store, other = remote(), remote()
    assert not store.contains(make(1).key)
    with pytest.raises(ChunkMissing):
        store.read(make(1).key)
    store.put(make(1))
    store.put(make(2, dtype=torch.bfloat16))
    same(other.read(make(1).key), make(1))
    same(other.read(make(2).key), make(2, dtype=torch.bfloat16))
    assert other.contains(make(1).key)
    assert store.nbytes() > FILE
    store.delete([make(1).key, make(3).key])
    assert not other.contains(make(1).key)
    assert other.contains(make(2).key)
    store.delete([make(2).key])
    assert store.nbytes() == 0
    assert store.parts() == []


def test_a_chunk_put_twice_counts_once(remote, make):
    store = remote()
    store.put(make(1))
    store.put(make(1))
    assert store.nbytes() == FILE


def test_each_rank_has_its_own_part_and_all_leave_together(remote, make, same):
    ranks = [remote(shard=(rank, 2)) for rank in range(2)]
    for rank, store in enumerate(ranks):
        store.put(make(1, rank=rank))
    for rank, store in enumerate(ranks):
        same(store.read(make(1).key), make(1, rank=rank))
    assert {part.shard for part in ranks[0].parts()} == {(0, 2), (1, 2)}
    ranks[0].delete([make(1).key])
    assert ranks[1].parts() == []


def test_another_host_learns_the_token_ids_from_the_server(remote, make):
    store = remote()
    store.put(make(1, tokens=20))
    (part,) = remote().parts()
    space, token_ids = remote().token_ids(part)
    assert (space, token_ids.tolist()) == (make(1).namespace, make(1, tokens=20).token_ids.tolist())
    assert store.token_ids(part._replace(key=make(2).key)) is None


def test_the_least_recently_used_leaves(remote, make, monkeypatch):
    monkeypatch.setattr(s3_module, "_KEEP", 1.0)
    store = remote(max_gb=4.5 * FILE / GIB)
    for number in range(4):
        store.put(make(number))
        time.sleep(1.1 if store.name == "s3" else 0.01)  # S3 tells times to the second
    store.read(make(0).key)
    time.sleep(2 * remote_module._USES_EVERY_S + 0.2)
    store.put(make(4))
    assert [store.contains(make(number).key) for number in range(5)] == [True, False, True, True, True]
    assert store.nbytes() == 4 * FILE


def test_the_bound_is_never_passed(remote, make):
    store = remote(max_gb=5 * FILE / GIB)
    for number in range(20):
        store.put(make(number % 11))
        assert store.contains(make(number % 11).key)
        assert store.nbytes() <= 5 * FILE
    assert store.nbytes() >= 3 * FILE
    with pytest.raises(StoreFull, match="max_gb"):
        store.put(make(1, tokens=64))


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "junk"])
def test_damage_is_found_and_cleared_away(remote, make, damage):
    store = remote()
    for position in (0, 9, 300, 700, -1) if damage == "flip" else (0,):
        store.put(make(1))

        def change(raw, position=position):
            if damage == "flip":
                raw[position] ^= 1
            return {"flip": raw, "truncate": raw[:-9], "empty": raw[:0], "junk": b"\xff" * len(raw)}[damage]

        overwrite(store, make(1).key, change)
        with pytest.raises(ChunkDamaged):
            store.read(make(1).key)
        with pytest.raises(ChunkMissing):
            store.read(make(1).key)


def test_a_chunk_swapped_with_anothers_is_damaged(remote, make):
    store = remote()
    store.put(make(1))
    store.put(make(2))
    other = bytearray(store._fetch(make(2).key, (0, 1)))
    overwrite(store, make(1).key, lambda raw: other)
    with pytest.raises(ChunkDamaged, match="holds chunk"):
        store.read(make(1).key)
    assert torch.equal(store.get(make(2).key), make(2).kv)


@pytest.mark.parametrize("key", ["../../etc/passwd", "a" * 31, "A" * 32, "", "a" * 32 + "\n", "*" * 32])
def test_only_keys_name_chunks(remote, make, key):
    store = remote()
    store.put(make(1))
    for act in (store.read, store.contains, lambda name: store.delete([name])):
        with pytest.raises(StoreError, match="32 lower-case"):
            act(key)
    assert len(store.parts()) == 1


def test_many_threads(remote, make):
    store, wrong = remote(), []

    def work(seed):
        for step in range(12):
            number = (seed * 3 + step) % 9
            try:
                store.put(make(number))
                if not torch.equal(store.get(make(number).key), make(number).kv):
                    wrong.append(number)
            except BaseException as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert store.nbytes() == 9 * FILE


@pytest.mark.parametrize("mode", ["stall", "trickle", "garbage", "refuse"])
def test_a_bad_server_is_a_reason_in_time_and_recovers(remote, proxy, make, mode, monkeypatch):
    monkeypatch.setattr(remote_module, "_FIRST_PAUSE_S", 0.3)
    store = remote(port=proxy.port, timeout_s=1)
    store.put(make(1))
    proxy.mode = mode
    if mode == "refuse":
        proxy.cut()
    for act in (store.read, store.contains, store.put, lambda key: store.delete([key])):
        began = time.monotonic()
        with pytest.raises((StoreUnreachable, ChunkDamaged, ChunkMissing)) as caught:
            act(make(1) if act == store.put else make(1).key)
        assert time.monotonic() - began < 10, "the set timeout is 1 s, a trickled answer takes minutes"
        assert store._place in str(caught.value)
    began = time.monotonic()
    for _ in range(50):
        with pytest.raises(StoreUnreachable):
            store.read(make(1).key)
    assert time.monotonic() - began < 25, "one call in many waits"
    proxy.mode = "pass"
    proxy.cut()
    deadline = time.monotonic() + 45
    while True:
        try:
            store.put(make(1))
            break
        except StoreUnreachable:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert torch.equal(store.get(make(1).key), make(1).kv)
    assert torch.equal(store.get(make(1).key), make(1).kv)


def test_a_server_that_was_never_there(remote, make):
    store = remote(port=1, timeout_s=1)
    with pytest.raises(StoreUnreachable, match="check"):
        store.read(make(1).key)


def test_behind_the_disk(kind, address, root, make, same, ingest, monkeypatch):
    config = BlendConfig(store_path=str(root), remote=(address(kind),))
    store, catalogue = open_store(config), open_catalogue(config)
    assert [tier.name for tier in store.tiers] == ["memory", "disk", kind]
    memory, disk, far = store.tiers
    for number in (1, 2):
        ingest(store, catalogue, make(number), "doc")
    assert far.contains(make(1).key)
    memory.delete([make(1).key])
    disk.delete([make(1).key])
    assert catalogue.missing([make(1).key]) == [], "what left the disk is still in the remote tier"
    assert store.get_with_tier(make(1).key)[1] == kind
    same(disk.read(make(1).key), make(1))
    assert store.get_with_tier(make(1).key)[1] == "memory"
    for tier in store.tiers:
        tier.delete([make(1).key])
    with pytest.raises(ChunkMissing):
        store.read(make(1).key)
    assert catalogue.missing([make(1).key, make(2).key]) == [make(1).key], "nobody holds it any more"
    assert catalogue.release("doc")
    assert store.delete_unheld([make(2).key]) == [make(2).key]
    assert not any(tier.contains(make(2).key) for tier in store.tiers)
    store.close()
    catalogue.close()


def test_many_chunks_of_a_slow_server_cost_one_wait(remote, make, tmp_path, monkeypatch):
    far = remote(timeout_s=20)
    chunks = [make(number) for number in range(12)]
    for chunk in chunks:
        far.put(chunk)
    together, fetch = threading.Barrier(11), far._fetch

    def slow(key, shard):
        together.wait(15)  # nobody is answered until all have asked
        return fetch(key, shard)

    monkeypatch.setattr(far, "_fetch", slow)
    store = TieredStore([MemoryStore(GIB), far])
    store.tiers[0].put(chunks[0])
    found = store.get_many(chunk.key for chunk in chunks)
    assert list(found) == [chunk.key for chunk in chunks]
    assert [tier for _, tier in found.values()] == ["memory"] + [far.name] * 11
    assert all(torch.equal(found[chunk.key][0], chunk.kv) for chunk in chunks)
    monkeypatch.setattr(far, "_fetch", fetch)
    store.tiers[0].close()
    far.delete([chunks[3].key])
    with pytest.raises(ChunkMissing):
        store.get_many(chunk.key for chunk in chunks)


def test_what_a_dead_server_may_hold_keeps_its_row(remote, root, make, ingest):
    far = remote(port=1, timeout_s=1)
    catalogue = open_catalogue(BlendConfig(store_path=str(root)))
    store = TieredStore([MemoryStore(GIB), far], catalogue=open_catalogue(BlendConfig(store_path=str(root))))
    catalogue.add(make(1).key, make(1).namespace, make(1).token_ids, 0, 1, 1)
    with pytest.raises(StoreUnreachable):
        store.read(make(1).key)
    assert catalogue.missing([make(1).key]) == []
    with pytest.raises(StoreUnreachable):
        store.put(make(2))
    assert not store.tiers[0].contains(make(2).key)
    store.close()
    catalogue.close()


def test_another_host_syncs(kind, address, tmp_path, make, ingest):
    here, there = (BlendConfig(store_path=str(tmp_path / host), remote=(address(kind),)) for host in ("here", "there"))
    store, catalogue = open_store(here), open_catalogue(here)
    for number in (1, 2):
        ingest(store, catalogue, make(number), "doc")
    far, other = open_remote(there), open_catalogue(there)
    overwrite(far[0], make(2).key, lambda raw: bytes(raw).replace(make(2).namespace.encode(), b"model-b"))
    forged = int(kind == "s3")  # Valkey keeps token ids apart from the file
    assert sync(there.store_path, far) == SyncResult(listed=2 - forged, gone=0, foreign=forged)
    ((key, token_ids), *_) = sorted(
        other.changes_since(0, make(1).namespace).added, key=lambda pair: pair[0] != make(1).key
    )
    assert (key, token_ids.tolist()) == (make(1).key, make(1).token_ids.tolist())
    assert torch.equal(open_store(there).get(make(1).key), make(1).kv)
    assert upkeep.check(there.store_path, repair=True, remote=far).ok
    assert upkeep.gc(there.store_path, max_bytes=0, remote=open_remote(there)).unheld == []
    assert other.missing([make(1).key]) == [], "gone from the disk, and still in the remote tier"
    catalogue.release("doc")
    assert set(store.delete_unheld([make(1).key, make(2).key])) == {make(1).key, make(2).key}
    assert sync(there.store_path, far).deleted == 2 - forged
    assert other.missing([make(1).key]) == [make(1).key]
    assert not upkeep.check(there.store_path, remote=far).rows_without_file


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://x/y", "redis://"),
        ("s3://", "s3://bucket"),
        ("redis://h?max_bg=3", "max_bg"),
        ("redis://h?max_gb=-1", "max_gb"),
        ("s3://b/p?timeout_s=soon", "timeout_s"),
        ("redis://me:secret@h?x=1", "me:…@h"),
    ],
)
def test_addresses_that_can_not_be_used(url, says):
    with pytest.raises(ConfigError) as caught:
        BlendConfig(remote=(url,))
    assert says in str(caught.value)
    assert "secret" not in str(caught.value)


def test_addresses():
    address = RemoteAddress.parse("s3://bucket/a/b?max_gb=2&timeout_s=0.5&region=eu")
    assert (address.max_bytes, address.timeout_s, address.options) == (2 * GIB, 0.5, {"region": "eu"})
    assert without_password("redis://:pw@h:1/0?max_gb=1") == "redis://:…@h:1/0?max_gb=1"
    assert BlendConfig.load(remote="redis://h").remote == ("redis://h",)
    assert BlendConfig.load(remote=["redis://h", "s3://b"]).remote == ("redis://h", "s3://b")


WRITER = """
import sys
sys.path[:0] = {path!r}
from kvblend_rag.commands.torture_kill import make
from kvblend_rag.config import BlendConfig
from kvblend_rag.store.open import open_remote
(store,) = open_remote(BlendConfig(store_path={root!r}, remote=({url!r},)))
number = 0
while True:
    store.put(make(number % 20))
    print(number % 20, flush=True)
    number += 1
"""


def test_a_writer_killed_while_it_sends(kind, address, root, remote, same):
    """Each chunk on the server is whole or not there, and the server's own count is right."""
    code = WRITER.format(path=[path for path in sys.path if path], root=str(root), url=address(kind))
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    acknowledged = {int(writer.stdout.readline()) for _ in range(7)}
    time.sleep(0.05)
    writer.kill()
    acknowledged |= {int(line) for line in writer.stdout.read().split("\n")[:-1]}
    writer.wait()
    store = remote()
    for number in acknowledged:
        same(store.read(make_tortured(number).key), make_tortured(number))
    parts = store.parts()
    assert {part.key for part in parts} >= {make_tortured(number).key for number in acknowledged}
    assert store.nbytes() == sum(part.nbytes for part in parts)
    for part in parts:
        store.read(part.key)


def test_stats_tell_of_the_tier_and_of_one_that_is_gone(kind, address, root, make, capsys, monkeypatch):
    config = BlendConfig(store_path=str(root), remote=(address(kind, max_gb=2),))
    store = open_store(config)
    store.put(make(1))
    store.close()
    for url, said in ((config.remote[0], "0.0 MiB of 2 GiB"), (address(kind, port=1, timeout_s=1), "check")):
        monkeypatch.setenv("KVBLEND_REMOTE", url)
        assert main(["store", "stats", "--store", str(root), "--json", "-"]) == 0
        (tier,) = json.loads(capsys.readouterr().out)["remote"]
        assert (tier["bytes"], said in str(tier)) == ((FILE, False) if said.startswith("0") else (None, True))
        assert main(["store", "stats", "--store", str(root)]) == 0
        assert said in " ".join(capsys.readouterr().out.split())
        assert tier["bound_bytes"] in (2 * GIB, 50 * GIB)


def test_another_tenants_identical_text_is_in_no_tier(kind, address, root, make, ingest):
    """Neither by key nor by time: the other tenant's chunk has another key, so no tier does any work for it."""
    config = BlendConfig(store_path=str(root), remote=(address(kind),))
    store, catalogue = open_store(config), open_catalogue(config)
    mine, theirs = (make(1, tokens=32, space=namespace("model", [1, 2], tenant)) for tenant in ("ada", "bob"))
    assert mine.token_ids.tolist() == theirs.token_ids.tolist()
    ingest(store, catalogue, mine, "doc")
    for tier in store.tiers:
        assert tier.contains(mine.key)
        assert not tier.contains(theirs.key)
        with pytest.raises(ChunkMissing):
            tier.read(theirs.key)
    assert catalogue.missing([mine.key, theirs.key]) == [theirs.key]
    assert catalogue.changes_since(0, theirs.namespace).added == []
    assert store.prefetch([theirs.key]) == 0
    store.delete([theirs.key])
    assert all(tier.contains(mine.key) for tier in store.tiers)
    store.close()
    catalogue.close()


@pytest.fixture
def hosts(kind, address, tmp_path):
    """Two hosts that share a tier: each a store, its catalogue, and its own ``sync``."""
    opened = []

    def host(name):
        config = BlendConfig(store_path=str(tmp_path / name), remote=(address(kind),))
        store, catalogue, far = open_store(config), open_catalogue(config), open_remote(config)
        opened.extend([store, catalogue, *far])
        return store, catalogue, lambda: sync(config.store_path, far)

    yield host
    for each in opened:
        each.close()


def test_what_one_host_deletes_leaves_the_others(hosts, make, ingest):
    (here, ours, _), (there, theirs, sync_there) = hosts("here"), hosts("there")
    chunks = [make(number) for number in range(3)]
    for chunk, document in zip(chunks, ("a", "b", "c"), strict=True):
        ingest(here, ours, chunk, document)
    sync_there()
    for chunk in chunks:
        there.read(chunk.key)  # copies in memory and on the disk
    ingest(there, theirs, chunks[1], "mine")  # a document of its own holds the second
    here.delete_unheld(ours.settle({}, ["a", "b"]))
    assert there.tiers[1].contains(chunks[0].key), "until it syncs"
    done = sync_there()
    assert (done.deleted, done.gone, done.listed) == (1, 0, 0)
    assert "1 chunks were deleted elsewhere, and here." in done.summary()
    assert theirs.missing([chunk.key for chunk in chunks]) == [chunks[0].key]
    assert [there.tiers[1].contains(chunk.key) for chunk in chunks] == [False, True, True]
    assert sync_there().deleted == 0


def test_what_is_stored_again_after_a_deletion_stays(hosts, make, ingest):
    (here, ours, _), (there, theirs, sync_there) = hosts("here"), hosts("there")
    ingest(here, ours, make(1), "a")
    sync_there()
    there.read(make(1).key)
    here.delete_unheld(ours.settle({}, ["a"]))
    ingest(here, ours, make(1), "a")
    assert sync_there().deleted == 0
    assert theirs.missing([make(1).key]) == []
    assert there.tiers[1].contains(make(1).key)


def test_what_left_for_want_of_room_or_was_damaged_is_no_deletion(hosts, make, ingest):
    """A server that restarts empty, or evicts, must not empty the disks of all hosts."""
    (here, ours, _), (there, theirs, sync_there) = hosts("here"), hosts("there")
    ingest(here, ours, make(1), "a")
    sync_there()
    there.read(make(1).key)
    here.tiers[-1].drop([make(1).key])
    assert sync_there().deleted == 0
    assert theirs.missing([make(1).key]) == []
    assert there.tiers[1].contains(make(1).key)


def test_a_host_that_was_away_for_too_long_keeps_what_the_tiers_hold(hosts, make, ingest, tmp_path):
    (here, ours, _), (there, theirs, sync_there) = hosts("here"), hosts("there")
    for number in (1, 2):
        ingest(here, ours, make(number), "a")
    sync_there()
    for number in (1, 2):
        there.read(make(number).key)
    here.tiers[-1].drop([make(1).key])  # as if its deletion were no longer on record
    month_ago = time.time() - WORD_KEPT_S - 60
    os.utime(tmp_path / "there" / "synced", (month_ago, month_ago))
    assert sync_there().deleted == 1
    assert theirs.missing([make(1).key, make(2).key]) == [make(1).key]
    assert not there.tiers[1].contains(make(1).key)


def test_a_deletion_that_a_faster_tier_missed_is_made_good(address, tmp_path, make, ingest):
    config = BlendConfig(store_path=str(tmp_path / "here"), remote=(address("valkey"), address("s3")))
    store, catalogue, far = open_store(config), open_catalogue(config), open_remote(config)
    ingest(store, catalogue, make(1), "a")
    far[0].put(make(1))
    far[1].delete([make(1).key])
    assert far[0].contains(make(1).key)
    catalogue.settle({}, ["a"])
    assert sync(config.store_path, far).deleted == 1
    assert not far[0].contains(make(1).key)
    assert catalogue.missing([make(1).key]) == [make(1).key]
    for each in (store, catalogue, *far):
        each.close()


def test_a_deletion_during_an_outage_is_made_up_for(kind, address, proxy, tmp_path, make, ingest):
    config = BlendConfig(store_path=str(tmp_path / "here"), remote=(address(kind, port=proxy.port, timeout_s=1),))
    store, catalogue = open_store(config), open_catalogue(config)
    for number in (1, 2):
        ingest(store, catalogue, make(number), "a")
    keys = [make(number).key for number in (1, 2)]
    proxy.mode = "refuse"
    proxy.cut()
    with pytest.raises(StoreUnreachable):
        store.delete_unheld(catalogue.settle({}, ["a"]))
    assert not any(tier.contains(key) for key in keys for tier in store.tiers[:2]), "the tiers that could have"
    assert sorted(catalogue.due()) == sorted(keys)
    proxy.mode = "pass"
    again, far = open_store(config), open_remote(config)
    ingest(again, catalogue, make(2), "b")  # stored again: not to be deleted any more
    done = sync(config.store_path, far)
    assert (done.listed, done.gone, done.deleted) == (0, 0, 0)
    assert [far[0].contains(key) for key in keys] == [False, True]
    assert catalogue.due() == []
    assert catalogue.missing(keys) == keys[:1]
    for each in (store, again, catalogue, *far):
        each.close()
