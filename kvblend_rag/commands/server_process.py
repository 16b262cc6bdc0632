"""ServerProcess: a `kvblend serve` in a process of its own, on a free port, until a block ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvblend_rag.errors import EngineUnavailable

_START_S = 600.0
_STOP_S = 60.0


@dataclass(frozen=True)
class ServerProcess:
    """A server that answers."""

    url: str
    pid: int
    log: Path

    def metric(self, name: str) -> float:
        """What ``/metrics`` shows under a name, all labels together."""
        shown = self._ask("/metrics")
        return sum(
            float(value) for value in re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", shown, re.MULTILINE)
        )

    def reset_prefix_cache(self) -> bool:
        """Empty vLLM's prefix cache; False where requests still hold blocks. Needs ``VLLM_SERVER_DEV_MODE``."""
        return bool(json.loads(self._ask("/reset_prefix_cache", method="POST"))["success"])

    def _ask(self, path: str, method: str = "GET") -> str:
        request = urllib.request.Request(f"{self.url}{path}", method=method)
        try:
            with urllib.request.urlopen(request, timeout=_STOP_S) as answer:
                return str(answer.read().decode())
        except OSError as error:
            raise EngineUnavailable(f"The server does not answer any more; it said last: {_said(self.log)}") from error


@contextlib.contextmanager
def running(command: Sequence[str], folder: Path, **environment: str) -> Iterator[ServerProcess]:
    """Start a server, and stop it when the block ends.

    Args:
        command: starts it, without host and port; the caller's ``KVBLEND_*`` variables are not for it.
        folder: takes its log.
        environment: further variables.

    Raises:
        EngineUnavailable: it did not start, or did not stop when told to.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("KVBLEND_")}
    log = folder / "log.txt"
    with log.open("w") as lines:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=lines,
            stderr=lines,
            start_new_session=True,
            env={**inherited, **environment},
        )
    made = ServerProcess(f"http://127.0.0.1:{port}", process.pid, log)
    try:
        end = time.monotonic() + _START_S
        while not _healthy(made.url):
            if process.poll() is not None or time.monotonic() > end:
                raise EngineUnavailable(f"The server did not start; it said last: {_said(log)}")
            time.sleep(0.5)
        yield made
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)
            raise EngineUnavailable(f"The server did not stop within {_STOP_S:g} s of being told to.") from error


def _said(log: Path) -> str:
    return (log.read_text(errors="replace").strip().splitlines() or ["nothing at all."])[-1]


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


__all__ = ["ServerProcess", "running"]
