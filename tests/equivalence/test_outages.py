"""Tiers that fail under a running engine: the plain answer and a reason, in time, and blending again when they return.

Real servers behind a wire that goes bad, and a device that fills up, is locked and goes away.
"""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from kvblend_rag.errors import StoreError

pytestmark = pytest.mark.full

TOLERANCE = 1e-4
TIMEOUT = 1.0
SLACK = 10.0
"""Seconds on a busy machine; a server that is waited for without an end takes longer."""

_spec = importlib.util.spec_from_file_location("outage_servers", Path(__file__).parents[1] / "store" / "servers.py")
servers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(servers)


def blends_again(rig, prompt, expected, seconds=90):
    """Ask until the prompt is blended; as it was before."""
    deadline = time.monotonic() + seconds
    while True:
        (answer,) = rig.fresh([prompt], selector="none")
        if answer.report.blended:
            assert answer.token_ids == expected.token_ids
            return answer
        assert time.monotonic() < deadline, answer.report.reason
        time.sleep(0.5)


def stored_everywhere(rig, chunk, prompt, seconds=90):
    """The answer from the first tier, as soon as all take the chunk: one that failed is left alone for a while."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(AssertionError):
            rig.store(chunk)
            (answer,) = rig.fresh([prompt], selector="none")
            if answer.report.blended and answer.report.chunks[0].tier == "valkey":
                return answer
        assert time.monotonic() < deadline
        time.sleep(0.5)


class Wires:
    """A Valkey and an S3 server, each behind a proxy."""

    def __init__(self, ports):
        self.proxies = {kind: servers.Proxy(port) for kind, port in ports.items()}

    def set(self, mode, kinds=("valkey", "s3")):
        for kind in kinds:
            self.proxies[kind].mode = mode
            if mode == "refuse":
                self.proxies[kind].cut()

    def remote(self):
        ports = {kind: proxy.port for kind, proxy in self.proxies.items()}
        return (
            f"redis://127.0.0.1:{ports['valkey']}?timeout_s={TIMEOUT:g}",
            f"s3://chunks/outages?endpoint=http://127.0.0.1:{ports['s3']}&timeout_s={TIMEOUT:g}",
        )


@pytest.fixture(scope="module")
def wires(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outages")
    ports = {"valkey": servers.free_port(), "s3": servers.free_port()}
    before = {name: os.environ.get(name) for name in servers.ACCESS}
    os.environ.update(servers.ACCESS)
    with servers.valkey_server(folder / "valkey", ports["valkey"]), servers.s3_server(folder / "s3", ports["s3"]):
        wires = Wires(ports)
        yield wires
        wires.set("pass")
        for proxy in wires.proxies.values():
            proxy.close()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture(scope="module")
def far(rigs, wires):
    """An engine that keeps nothing on its own machine."""
    return rigs.get("llama", blocks=24, local_device="disk", max_disk_gb=0, remote=wires.remote())


@pytest.mark.parametrize("mode", ["stall", "trickle", "garbage", "refuse"])
def test_remote_tiers_that_fail_and_return(far, wires, mode):
    rig = far
    chunk = rig.tokens(150, 7000 + len(mode))
    prompt = np.concatenate([rig.tokens(20, 1), chunk, rig.tokens(30, 3)])
    plain = rig.plain(prompt)
    whole = stored_everywhere(rig, chunk, prompt)
    wires.set(mode)
    for _ in range(3):
        started = time.monotonic()
        (answer,) = rig.fresh([prompt], selector="none")
        assert time.monotonic() - started < 4 * TIMEOUT + SLACK
        assert not answer.report.blended
        assert answer.report.reason
        assert answer.difference(plain) < TOLERANCE
    wires.set("pass")
    if mode == "garbage":  # what came damaged was deleted: it could have been the server's
        stored_everywhere(rig, chunk, prompt)
    blends_again(rig, prompt, whole)


@pytest.mark.parametrize("mode", ["stall", "refuse"])
def test_a_tier_that_fails_is_stood_in_for_by_the_next(far, wires, mode):
    rig = far
    chunk = rig.tokens(150, 7100 + len(mode))
    prompt = np.concatenate([rig.tokens(20, 1), chunk, rig.tokens(30, 3)])
    whole = stored_everywhere(rig, chunk, prompt)
    wires.set(mode, ["valkey"])
    (answer,) = rig.fresh([prompt], selector="none")
    wires.set("pass")
    assert answer.report.blended
    assert answer.report.chunks[0].tier == "s3"
    assert answer.token_ids == whole.token_ids
    blends_again(rig, prompt, whole)


def mounted(image, folder):
    """Whether the file system of an image stands at a folder; after an error the kernel makes it read-only."""
    return not subprocess.run(
        ["mount", "-o", "loop,errors=remount-ro", str(image), str(folder)], capture_output=True
    ).returncode


@pytest.fixture(scope="module")
def device(rigs, tmp_path_factory):
    """An engine whose store is a file system of its own, and that one's image."""
    folder, image = tmp_path_factory.mktemp("device"), tmp_path_factory.mktemp("image") / "image"
    make = ["mkfs.ext4", "-q", "-m", "0", str(image), "24m"]
    tools = shutil.which("mount") and shutil.which("mkfs.ext4")
    if os.geteuid() or not tools or subprocess.run(make, capture_output=True).returncode or not mounted(image, folder):
        pytest.skip("mounting a file system needs root")
    yield rigs.get("llama", blocks=24, local_device="disk", store_path=str(folder / "store")), folder, image
    rigs.close()
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def asked(rig, seed):
    chunk = rig.tokens(150, seed)
    prompt = np.concatenate([rig.tokens(20, 1), chunk, rig.tokens(30, 3)])
    return chunk, prompt, rig.plain(prompt)


def test_a_full_device(device):
    rig, folder, _ = device
    chunk, prompt, _ = asked(rig, 7200)
    rig.store(chunk)
    (whole,) = rig.fresh([prompt], selector="none")
    other, other_prompt, other_plain = asked(rig, 7201)
    with (folder / "filler").open("wb") as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(1 << 16))
            filler.flush()
    with pytest.raises(StoreError, match=r"[Nn]o space|full"):
        rig.llm.kvblend.ingest([other], progress=False)
    (answer,) = rig.fresh([other_prompt], selector="none")
    assert not answer.report.blended
    assert answer.difference(other_plain) < TOLERANCE
    blends_again(rig, prompt, whole, seconds=1)
    (folder / "filler").unlink()
    assert rig.llm.kvblend.ingest([other], progress=False).computed == 1
    (answer,) = rig.fresh([other_prompt], selector="none")
    assert answer.report.blended


def test_a_device_that_is_gone_and_comes_back(device):
    rig, folder, _ = device
    chunk, prompt, plain = asked(rig, 7210)
    rig.store(chunk)
    (whole,) = rig.fresh([prompt], selector="none")
    os.rename(folder / "store", folder / "away")
    (answer,) = rig.fresh([prompt], selector="none")
    assert not answer.report.blended
    assert answer.report.reason
    assert answer.difference(plain) < TOLERANCE
    other, _, _ = asked(rig, 7211)
    with pytest.raises(StoreError):
        rig.llm.kvblend.ingest([other], progress=False)
    assert not (folder / "store" / "chunks").exists()
    shutil.rmtree(folder / "store", ignore_errors=True)
    os.rename(folder / "away", folder / "store")
    rig.store(chunk)
    blends_again(rig, prompt, whole)


@contextlib.contextmanager
def locked_mount(folder, image):
    """The folder is read-only for whoever opens a file in it; what is open can still be written."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
    try:
        yield "mount it writable, or choose another store_path."
    finally:
        subprocess.run(["umount", folder], check=True)


@contextlib.contextmanager
def locked_device(folder, image):
    """The kernel has found an error and writes nothing any more, also of what is open; then another device is there.

    The same one can't be mounted writable while somebody has a file of it open.
    """
    (name,) = (line.split()[0] for line in Path("/proc/mounts").read_text().splitlines() if f" {folder} " in line)
    Path(f"/sys/fs/ext4/{Path(name).name}/trigger_fs_error").write_text("1")
    try:
        yield "check the device."
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
        repaired = image.with_name("repaired")
        shutil.copyfile(image, repaired)
        assert subprocess.run(["e2fsck", "-fy", repaired], capture_output=True).returncode in (0, 1)
        assert mounted(repaired, folder)


@pytest.mark.parametrize("lock", [locked_mount, locked_device])
def test_a_device_that_is_read_only_for_a_while(device, lock):
    rig, folder, image = device
    chunk, prompt, plain = asked(rig, 7220 + len(lock.__name__))
    other, other_prompt, other_plain = asked(rig, 7240 + len(lock.__name__))
    rig.store(chunk)
    (whole,) = rig.fresh([prompt], selector="none")
    with lock(folder, image) as advice:
        with pytest.raises(OSError, match="Read-only file system"):
            (folder / "file").touch()
        blends_again(rig, prompt, whole, seconds=1)
        with pytest.raises(StoreError, match=f"can't be .*{advice}$"):
            rig.llm.kvblend.ingest([other], progress=False)
        (answer,) = rig.fresh([other_prompt], selector="none")
        assert not answer.report.blended
        assert answer.difference(other_plain) < TOLERANCE
        (exact,) = rig.fresh([prompt], selector="everything")
        assert exact.difference(plain) < TOLERANCE
    assert rig.llm.kvblend.ingest([other], progress=False).computed == 1
    (answer,) = rig.fresh([other_prompt], selector="none")
    assert answer.report.blended
    blends_again(rig, prompt, whole)
