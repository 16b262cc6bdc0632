"""An engine for one command: which model and store, a quiet start, and an orderly end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvblend_rag.commands import terminal
from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import EngineUnavailable

if TYPE_CHECKING:
    from kvblend_rag.llm import LLM

# The reader needs 45 KiB a token in float32: enough for two prompts of its whole context.
_READER_KV_BYTES = 1 << 30
_READER_ARGUMENTS = {"kv_cache_memory_bytes": _READER_KV_BYTES}
_CAUSE = re.compile(r"(?:^|\s)(?:[\w.]+\.)?(\w*(?:Error|Exception)): (.+)")


@dataclass(frozen=True)
class EngineOptions:
    """What a user may say about engine and store on the command line."""

    model: str | None = None
    store: str | None = None
    config: str | None = None
    eager: bool = False
    verbose: bool = False

    def resolve(self, **defaults: Any) -> BlendConfig:
        """The effective configuration; without a model, it names the bundled reader, prepared if need be.

        Args:
            defaults: settings used where neither the command line nor the configuration says otherwise.

        Raises:
            ConfigError: a setting that can't be used.
            ModelNotFound: the reader's weights are not installed.
        """
        from kvblend_rag.demo.prompt import SYSTEM_PROMPT

        given = {"store_path": str(Path(self.store).expanduser())} if self.store else {}
        config = BlendConfig.load(self.config, **given)
        plain = BlendConfig()
        unset = {name: value for name, value in defaults.items() if getattr(config, name) == getattr(plain, name)}
        # What `ask` and `demo` put in front; chunks are best computed behind the same.
        config = config.replace(**{"system_prompt": config.system_prompt or SYSTEM_PROMPT, **unset})
        arguments = dict(config.engine_args)
        if self.eager:
            arguments["enforce_eager"] = True
        model = str(Path(self.model).expanduser()) if self.model else config.model
        if not model:
            from kvblend_rag.demo.reader import prepare_reader

            model = str(prepare_reader())
            arguments = {**_READER_ARGUMENTS, **arguments}
        return config.replace(model=model, engine_args=arguments)


def check_writable(config: BlendConfig) -> None:
    """Open the store now: an engine takes half a minute to start, and could then not write.

    Raises:
        StoreError: it can't be made, written or read.
    """
    from kvblend_rag.store import open_catalogue

    open_catalogue(config).close()


@contextlib.contextmanager
def started(config: BlendConfig, *, verbose: bool = False) -> Iterator[LLM]:
    """An engine of this configuration, closed afterwards; Ctrl-C reaches this process alone.

    vLLM's messages go to a file, which is named when it does not start.

    Raises:
        KVBlendError: what starting an engine raises.
    """
    descriptor, name = tempfile.mkstemp(prefix="kvblend-vllm-", suffix=".log")
    os.close(descriptor)
    log = Path(name)
    about = f"Starting vLLM with {Path(config.model).name} (about half a minute)"
    with contextlib.nullcontext(terminal.err()) if verbose else terminal.output_to(log) as screen, screen.status(about):
        try:
            llm = _launched(config)
        except EngineUnavailable as error:
            raise EngineUnavailable(_with_cause(str(error), log)) from error
        except BaseException:
            log.unlink(missing_ok=True)
            raise
    try:
        yield llm
    finally:
        with contextlib.nullcontext() if verbose else terminal.output_to(log):
            llm.close()
        log.unlink(missing_ok=True)


def _launched(config: BlendConfig) -> LLM:
    """Start in a thread that has Ctrl-C blocked: vLLM's processes inherit that, and outlive a Ctrl-C.

    So what they have computed can still be written, and they are stopped in order.
    """
    result: list[Any] = []
    # It starts with the first process, and lets Ctrl-C through again when it does.
    resource_tracker.ensure_running()

    def launch() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            from kvblend_rag.llm import LLM

            result.append(LLM(config=config))
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=launch, name="kvblend-start", daemon=True)
    thread.start()
    try:
        thread.join()
    except KeyboardInterrupt:
        for child in multiprocessing.active_children():
            child.terminate()
        thread.join(timeout=10)
        raise
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]  # type: ignore[no-any-return]


def _with_cause(message: str, log: Path) -> str:
    """vLLM says no more than that its process died; the reason is the first error in its messages."""
    text = log.read_text(encoding="utf-8", errors="replace")
    causes = [match[2].strip() for match in map(_CAUSE.search, text.splitlines()) if match]
    if not text.strip():
        log.unlink(missing_ok=True)
        return message
    reason = f" The first error was: {causes[0]}" if causes and causes[0] not in message else ""
    return f"{message.rstrip('.')}.{reason} (vLLM's messages: {log})"


__all__ = ["EngineOptions", "check_writable", "started"]
