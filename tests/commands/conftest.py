import contextlib
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvblend_rag import cli
from kvblend_rag.config import BlendConfig
from kvblend_rag.quality.forcing import engine_arguments

Ran = subprocess.CompletedProcess[str]


@pytest.fixture
def kvblend(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Ran]]:
    """``kvblend("verb", …)`` in this process: exit code and output; what it sets in the process is undone."""
    for name in list(os.environ):
        if name.startswith("KVBLEND_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")
    environment = dict(os.environ)

    def run(*arguments: object) -> Ran:
        capfd.readouterr()
        code = cli.main([str(each) for each in arguments])
        captured = capfd.readouterr()
        return subprocess.CompletedProcess([*map(str, arguments)], code, captured.out, captured.err)

    with warnings.catch_warnings():
        yield run
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="session")
def in_a_process() -> Callable[..., subprocess.Popen[str]]:
    """``kvblend`` as a user runs it, in a process (and a process group) of its own."""

    def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "kvblend_rag.cli", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "COLUMNS": "200", **environment},
            start_new_session=True,
            # A test run in a shell's background inherits an ignored Ctrl-C; a user's terminal does not.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    return start


@pytest.fixture(scope="session")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """A file system of 48 MiB of its own; None where this user may not mount one."""
    folder = tmp_path_factory.mktemp("disk")
    mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)], capture_output=True, check=False
        ).returncode
        == 0
        if os.geteuid() == 0 and shutil.which("mount")
        else False
    )
    yield folder if mounted else None
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def config(tiny_model: Callable[[str], Path], small_disk: Path | None, tmp_path_factory: Any) -> BlendConfig:
    """Of the engine that the tests of commands share: a tiny random model, its store on the small disk."""
    return BlendConfig(
        model=str(tiny_model("llama")),
        store_path=str((small_disk or tmp_path_factory.mktemp("commands")) / "store"),
        system_prompt="Answer the question from the documents.",
        planner=False,  # a tiny model is computed sooner than anything is loaded
        engine_args={
            "enforce_eager": True,
            "dtype": "float32",
            "max_model_len": 2560,
            "kv_cache_memory_bytes": 1 << 28,
            **engine_arguments(),
        },
    )


@pytest.fixture(scope="package")
def llm(config: BlendConfig, rigs: Any) -> Iterator[Any]:
    """That engine; it ends with these tests, for engines that others start want the memory."""
    from kvblend_rag import LLM

    rigs.close()  # one engine at a time
    with LLM(config=config) as llm:
        yield llm


@pytest.fixture
def shared_engine(llm: Any, config: BlendConfig, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Verbs run on the shared engine instead of starting one of their own."""
    from kvblend_rag.commands import ask, bench, calibrate, demo, eval, ingest, session, verify

    @contextlib.contextmanager
    def started(*_: object, **__: object) -> Iterator[Any]:
        yield llm

    for module in (ask, bench, calibrate, demo, eval, ingest, verify):
        monkeypatch.setattr(module, "started", started)
    monkeypatch.setattr(session.EngineOptions, "resolve", lambda self, **defaults: config)
    return llm
