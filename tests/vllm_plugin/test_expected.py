"""A vLLM that has changed is met with one sentence at start."""

import importlib
import subprocess
import sys

import pytest

pytest.importorskip("vllm")

from kvblend_rag.errors import EngineUnavailable
from kvblend_rag.vllm_plugin import expected
from kvblend_rag.vllm_plugin.versions import NEWEST


def test_the_installed_one_is_as_expected():
    assert expected.lacking() == []


@pytest.mark.parametrize(
    ("place", "change", "why"),
    [
        ("vllm.forward_context:set_forward_context", None, "vllm.forward_context.set_forward_context is gone"),
        (
            "vllm.forward_context:set_forward_context",
            lambda attn_metadata, vllm_config, *, tokens=None, slot_mapping=None: None,
            "vllm.forward_context.set_forward_context takes no 'num_tokens'",
        ),
        (
            "vllm.v1.request:Request.update_block_hashes",
            None,
            "vllm.v1.request.Request.update_block_hashes is gone",
        ),
        (
            "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1.request_finished",
            lambda self, request: None,
            "KVConnectorBase_V1.request_finished takes no 'block_ids'",
        ),
    ],
    ids=["gone", "other parameter", "method gone", "hook of another signature"],
)
def test_a_planted_change_is_named_with_what_to_install(monkeypatch, place, change, why):
    module, _, path = place.partition(":")
    owner = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    if change is None:
        monkeypatch.delattr(owner, name)
    else:
        monkeypatch.setattr(owner, name, change)
    with pytest.raises(EngineUnavailable) as raised:
        expected.expect()
    sentence = str(raised.value)
    assert why in sentence
    assert f"pip install 'vllm~={NEWEST[0]}.{NEWEST[1]}.0'" in sentence
    assert "\n" not in sentence


def test_several_changes_are_one_sentence(monkeypatch):
    monkeypatch.setitem(expected.EXPECTED, "vllm.no_such_module:Anything", ())
    monkeypatch.setitem(expected.EXPECTED, "vllm.config:NoSuchConfig", ())
    with pytest.raises(EngineUnavailable, match=r"vllm\.no_such_module\.Anything is gone \(and 1 more\)"):
        expected.expect()


MODULES = ("engine", "connector", "compat")


def test_nobody_trips_before_it_was_said():
    """A symbol that these modules import themselves is gone: still the sentence, and no ImportError."""
    program = (
        "import importlib, os, sys\n"
        "import vllm.v1.attention.backend as backend, vllm.v1.engine.async_llm as llm\n"
        "del backend.CommonAttentionMetadata, llm.AsyncLLM\n"
        "for module in sys.argv[1:]:\n"
        "    if os.fork() == 0:  # each is the first to be imported\n"
        "        try:\n"
        "            importlib.import_module(f'kvblend_rag.vllm_plugin.{module}')\n"
        "        except BaseException as error:\n"
        "            kind = type(error)\n"
        "            print(f'{module}: {kind.__module__}.{kind.__qualname__}: {error}', flush=True)\n"
        "        os._exit(0)\n"
        "    os.wait()\n"
    )
    ran = subprocess.run([sys.executable, "-c", program, *MODULES], capture_output=True, text=True, check=True)
    said = [line for line in ran.stdout.splitlines() if line.startswith(MODULES)]
    assert len(said) == len(MODULES), ran.stdout
    for module, sentence in zip(MODULES, said, strict=True):
        assert sentence.startswith(f"{module}: kvblend_rag.errors.EngineUnavailable: vLLM ")
        assert "is gone (and " in sentence
