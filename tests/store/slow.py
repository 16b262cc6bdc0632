"""Run a command beside real servers behind a slow wire; ``{valkey}`` and ``{s3}`` in it stand for their addresses.

python tests/store/slow.py --megabytes 5 -- kvblend bench planner --remote {valkey} --remote {s3}
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_spec = importlib.util.spec_from_file_location("slow_servers", Path(__file__).with_name("servers.py"))
servers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(servers)


class SlowProxy(servers.Proxy):
    """A wire of so many bytes a second, with a wait in front of each answer."""

    def __init__(self, port: int, rate: float, wait: float) -> None:
        self._rate, self._wait = rate, wait
        super().__init__(port)

    def _pump(self, source, sink, answers) -> None:
        if not answers:
            return super()._pump(source, sink, answers)
        idle = 0.0
        try:
            while data := source.recv(65_536):
                if time.monotonic() - idle > self._wait:
                    time.sleep(self._wait)
                time.sleep(len(data) / self._rate)
                sink.sendall(data)
                idle = time.monotonic()
        except OSError:
            return None
        finally:
            source.close()
            sink.close()


SERVERS = {
    "valkey": (servers.valkey_server, "redis://127.0.0.1:{port}?timeout_s=60"),
    "s3": (servers.s3_server, "s3://chunks/slow?endpoint=http://127.0.0.1:{port}&timeout_s=60"),
}
"""By the name of their tier: how they are started, and their address."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=5.0, help="a second and connection (default 5)")
    parser.add_argument("--wait", type=float, default=0.05, help="seconds before an answer begins (default 0.05)")
    parser.add_argument("command", nargs="+")
    given = parser.parse_args()
    addresses = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name, (start, address) in SERVERS.items():
            if any(f"{{{name}}}" in each for each in given.command):
                port = servers.free_port()
                stack.enter_context(start(folder / name, port))
                proxy = stack.enter_context(contextlib.closing(SlowProxy(port, given.megabytes * 1e6, given.wait)))
                addresses[name] = address.format(port=proxy.port)
        command = given.command
        for name, address in addresses.items():
            command = [each.replace(f"{{{name}}}", address) for each in command]
        return subprocess.run(command, env={**os.environ, **servers.ACCESS}).returncode


if __name__ == "__main__":
    sys.exit(main())
