"""Keeps vLLM's start-up messages out of a notebook."""

import contextlib
import logging
import os
import warnings

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message="IProgress not found")
logging.disable(logging.INFO)  # wordllama turns INFO on for the whole process


_NOWHERE = open(os.devnull, "w")  # noqa: SIM115 - stays open: loggers made inside keep it


@contextlib.contextmanager
def quiet():
    """Nothing is printed inside, by this process or by those it starts, however deep."""
    kept = [os.dup(1), os.dup(2)]
    os.dup2(_NOWHERE.fileno(), 1)
    os.dup2(_NOWHERE.fileno(), 2)
    try:
        with contextlib.redirect_stdout(_NOWHERE), contextlib.redirect_stderr(_NOWHERE):
            yield
    finally:
        for number, copy in enumerate(kept, start=1):
            os.dup2(copy, number)
            os.close(copy)


with quiet(), contextlib.suppress(ImportError):  # what vLLM says when it is imported
    from vllm import SamplingParams  # noqa: F401
