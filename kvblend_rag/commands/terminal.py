"""What the commands print, and what of others' messages is kept off the screen."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from kvblend_rag.errors import ConfigError

_WIDTH_IN_A_PIPE = 120

# Inherited by vLLM's processes.
_QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def hush(*, verbose: bool = False) -> None:
    """Silence the libraries below us, save for what the user has set; call it before they are imported."""
    warnings.showwarning = _show_warning
    if verbose:
        return
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", module=r"kvblend_rag(\.|$)")


def out() -> Console:
    """Standard output."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH_IN_A_PIPE)


def err() -> Console:
    """Standard error."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def complain(message: str) -> None:
    """One sentence about what went wrong, in red."""
    err().print(Text(message, "red"))


def write_json(result: Any, target: str | None) -> None:
    """Write JSON to a file, to standard output for ``-``, or nowhere for None.

    Raises:
        ConfigError: the file can't be written.
    """
    if target is None:
        return
    text = json.dumps(result, indent=2, ensure_ascii=False)
    if target == "-":
        print(text)
        return
    try:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{target} can't be written: {error.strerror}.") from error


def prose(json_target: str | None) -> Console:
    """Where tables and sentences go: not among the JSON."""
    return err() if json_target == "-" else out()


@contextlib.contextmanager
def output_to(log: Path) -> Iterator[Console]:
    """Send all output of this process, and of those it starts meanwhile for good, to a file.

    Yields:
        A console that still writes to standard error.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        with os.fdopen(os.dup(saved[1]), "w", encoding="utf-8") as screen:
            yield Console(file=screen, highlight=False)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, original in zip((1, 2), saved, strict=True):
            os.dup2(original, descriptor)
            os.close(original)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    err().print(Text(str(message), "yellow"))


__all__ = ["complain", "err", "hush", "out", "output_to", "prose", "write_json"]
