"""The command line that `kvblend serve` hands to vLLM, read back by vLLM's own parser; no server is started."""

from __future__ import annotations

import importlib.metadata
import json

import pytest

pytest.importorskip("vllm")

from kvblend_rag.commands import serve as command
from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import ConfigError, ModelNotFound
from kvblend_rag.vllm_plugin import serve as module
from kvblend_rag.vllm_plugin.launch import WORKER_CLASS
from kvblend_rag.vllm_plugin.serve import allowed_plugins, serve_arguments


@pytest.fixture
def parsed():
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers(required=True, dest="subparser"))

    def parse(*arguments, **settings):
        return parser.parse_args(["serve", *serve_arguments(arguments, BlendConfig(**settings))])

    return parse


def test_vllm_reads_what_is_handed_to_it(parsed):
    given = parsed("a-model", "--max-model-len", "1024", "--port=81", recompute_ratio=0.3, store_path="/s")
    assert (given.model_tag, given.max_model_len, given.port) == ("a-model", 1024, 81)
    assert given.worker_cls == WORKER_CLASS
    assert given.kv_transfer_config.kv_connector_extra_config["recompute_ratio"] == 0.3
    assert BlendConfig.load(**given.kv_transfer_config.kv_connector_extra_config).store_path == "/s"
    assert given.api_server_count == 1


def test_what_the_user_says_wins_over_this_machines_defaults(parsed, monkeypatch):
    monkeypatch.setattr(module, "platform_defaults", lambda _: {"dtype": "float32", "gpu_memory_utilization": 0.4})
    given = parsed("m")
    assert (given.dtype, given.gpu_memory_utilization) == ("float32", 0.4)
    given = parsed("m", "--dtype=bfloat16", "--gpu_memory_utilization", "0.7", "--api-server-count", "2")
    assert (given.dtype, given.gpu_memory_utilization, given.api_server_count) == ("bfloat16", 0.7, 2)


@pytest.mark.parametrize("option", ["--worker-cls=x", "--kv-transfer-config", "--kv_transfer_config.kv_role"])
def test_what_is_ours_to_set_is_refused(option):
    with pytest.raises(ConfigError, match="kvblend serve sets --"):
        serve_arguments(["m", option], BlendConfig())


def test_a_risk_that_nobody_would_judge_is_refused():
    with pytest.raises(ConfigError, match=r"max_risk is 0\.5"):
        serve_arguments(["m"], BlendConfig(max_risk=0.5))


def test_a_model_that_is_not_there():
    with pytest.raises(ModelNotFound, match="There is no model at"):
        serve_arguments(["./nowhere"], BlendConfig())


def test_plugins_of_other_kinds_are_not_shut_out():
    names = allowed_plugins(None).split(",")
    general = {each.name for each in importlib.metadata.entry_points(group="vllm.general_plugins")}
    assert general
    assert general | {"kvblend"} <= set(names)
    assert allowed_plugins("mine") == "mine,kvblend"
    assert allowed_plugins("kvblend") == "kvblend"
    assert allowed_plugins("") == "kvblend"


def test_vllm_finds_the_plugin(monkeypatch):
    """The entry point of the installed distribution, loaded by vLLM's own code."""
    from fastapi import FastAPI
    from vllm.plugins import load_endpoint_plugins

    monkeypatch.setenv("VLLM_PLUGINS", "kvblend")
    (plugin,) = load_endpoint_plugins(("generate",))
    app = FastAPI()
    plugin.attach_router(app)
    assert "/v1/kvblend/documents" in app.openapi()["paths"]
    assert load_endpoint_plugins(("embed",)) == []


def test_settings_on_the_command_line(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(module, "serve", lambda rest, config: seen.append((rest, config)) or 0)
    file = tmp_path / "kvblend.yaml"
    file.write_text("model: of-the-file\nselector: first\n")
    given = {"store": str(tmp_path / "s"), "kvblend_config": str(file)}
    assert command.run(rest=["--port", "1"], settings=["recompute_ratio=0.2", "learn_seen=true"], **given) == 0
    assert command.run(rest=["other", "--port", "1"], **given) == 0
    (first, config), (second, _) = seen
    assert (first, second) == (["of-the-file", "--port", "1"], ["other", "--port", "1"])
    assert (config.selector, config.recompute_ratio, config.learn_seen) == ("first", 0.2, True)
    assert command.run(rest=[], vllm_help="page") == 0
    assert seen[-1][0] == ["--help=page"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [(["no-sign"], "--set takes NAME=VALUE"), (["a=["], "is not YAML"), (["recompute_ration=1"], "recompute_ratio")],
)
def test_settings_that_can_not_be_used(settings, says):
    with pytest.raises(ConfigError, match=says):
        command.run(rest=["m"], settings=settings)


def test_the_transfer_config_is_json():
    arguments = serve_arguments(["m"], BlendConfig(remote=("redis://h:1",)))
    assert json.loads(arguments[arguments.index("--kv-transfer-config") + 1])["kv_role"] == "kv_both"
