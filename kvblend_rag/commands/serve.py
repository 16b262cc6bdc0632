"""``kvblend serve MODEL``: ``vllm serve`` with connector, worker class and routes configured."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from kvblend_rag.commands.session import check_writable
from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import VLLM_MISSING, ConfigError, EngineUnavailable


def run(
    *,
    rest: Sequence[str],
    store: str | None = None,
    kvblend_config: str | None = None,
    settings: Sequence[str] = (),
    vllm_help: str | None = None,
) -> int:
    """Serve until told to stop.

    Args:
        rest: everything of the command line that is vLLM's.
        store: folder of the chunk store.
        kvblend_config: YAML file of settings.
        settings: further ones, ``NAME=VALUE``.
        vllm_help: show the options of ``vllm serve`` that this names, or all, instead.

    Raises:
        KVBlendError: an argument or setting that can't be used, no vLLM, or it did not start.
    """
    given: dict[str, Any] = {"store_path": str(Path(store).expanduser())} if store else {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set takes NAME=VALUE, and got {setting!r}.")
        try:
            given[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"The value of --set {name} is not YAML: {value!r}.") from error
    config = BlendConfig.load(kvblend_config, **given)
    if config.engine_args:
        raise ConfigError("engine_args are not for a server: give vLLM's options behind the model, as --max-model-len.")
    if importlib.util.find_spec("vllm") is None:
        raise EngineUnavailable(VLLM_MISSING)
    from kvblend_rag.vllm_plugin.serve import serve

    if vllm_help is not None:
        return serve([f"--help={vllm_help}"], config)
    check_writable(config)
    model = (
        [config.model] if config.model and not (rest and not rest[0].startswith("-")) and "--model" not in rest else []
    )
    return serve([*model, *rest], config)


__all__ = ["run"]
