"""Run a command beside a real Valkey behind a slow wire; ``{url}`` in the command stands for its address.

python tests/store/slow.py --megabytes 5 -- kvblend bench planner --remote {url}
"""

from __future__ import annotations

import argparse
import importlib.util
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=5.0, help="a second and connection (default 5)")
    parser.add_argument("--wait", type=float, default=0.05, help="seconds before an answer begins (default 0.05)")
    parser.add_argument("command", nargs="+")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        port = servers.free_port()
        with servers.valkey_server(Path(folder), port):
            proxy = SlowProxy(port, given.megabytes * 1e6, given.wait)
            url = f"redis://127.0.0.1:{proxy.port}?timeout_s=60"
            ran = subprocess.run([each.replace("{url}", url) for each in given.command])
            proxy.close()
    return ran.returncode


if __name__ == "__main__":
    sys.exit(main())
