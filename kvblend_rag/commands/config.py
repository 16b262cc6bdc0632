"""``kvblend config``: every setting with its effective value."""

from __future__ import annotations

import os

import yaml

from kvblend_rag.address import without_password
from kvblend_rag.commands import terminal
from kvblend_rag.config import CONFIG_FILE_VARIABLE, BlendConfig


def run(*, config: str | None = None, json: str | None = None) -> int:
    """Print the configuration that the other verbs would use.

    Raises:
        ConfigError: a setting that can't be used.
    """
    effective = BlendConfig.load(config).to_dict()
    effective["remote"] = [without_password(url) for url in effective["remote"]]
    file = config or os.environ.get(CONFIG_FILE_VARIABLE)
    variables = sorted(name for name in os.environ if name.startswith("KVBLEND_") and name != CONFIG_FILE_VARIABLE)
    console = terminal.prose(json)
    console.print(f"# file: {file or 'none'}; variables: {', '.join(variables) or 'none'}", style="dim")
    if json != "-":
        print(yaml.safe_dump(effective, sort_keys=False, allow_unicode=True), end="")
    terminal.write_json(effective, json)
    return 0


__all__ = ["run"]
