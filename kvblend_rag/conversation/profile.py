"""The profile of a model that is not loaded: read from its folder, without torch, vLLM or network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvblend_rag.config import BlendConfig
from kvblend_rag.conversation import dialect
from kvblend_rag.conversation.turn import ModelProfile

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def profile_of(config: BlendConfig) -> ModelProfile | None:
    """What the configured model can do; None when its name is no local folder with a readable ``config.json``.

    ``Chat.profile`` asks the running engine and is exact; this is for frameworks that ask before a start.
    """
    folder = Path(config.model).expanduser()
    described = _json(folder / "config.json") if config.model else {}
    if not described:
        return None
    text = described.get("text_config", described)
    lengths = [text[name] for name in _LENGTHS if isinstance(text.get(name), int)]
    longest = config.engine_args.get("max_model_len") or (min(lengths) if lengths else None)
    if not isinstance(longest, int):
        return None
    template = _template(folder)
    architectures = described.get("architectures") or ()
    return ModelProfile(
        max_input_tokens=longest,
        tool_calling=bool(template),
        reasoning_output=bool(dialect.reasoning_parser(template, architectures)),
        native_tools="tools" in template,
    )


def _template(folder: Path) -> str:
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except OSError:
        pass
    given = _json(folder / "tokenizer_config.json").get("chat_template") or ""
    if isinstance(given, list):
        named = {each["name"]: each["template"] for each in given}
        given = named.get("tool_use") or named.get("default") or ""
    return str(given)


def _json(path: Path) -> Mapping[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


__all__ = ["profile_of"]
