"""Sampling: how an answer is drawn and what form it takes; vLLM's and OpenAI's names, no vLLM."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from kvblend_rag.errors import ConfigError

_NAMED_ALIKE = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "max_tokens",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is drawn. None leaves a value to the model's own generation configuration."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    max_tokens: int | None = None
    """Longest answer, in tokens; None: what the context has room for."""
    n: int = 1
    """Answers drawn from one prompt."""
    logprobs: bool = False
    top_logprobs: int = 0
    """Alternatives given for each token, 0 to 20."""
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    json_schema: dict[str, Any] | None = None
    """The answer is JSON of this schema; one of these three at most."""
    json_object: bool = False
    """The answer is a JSON object."""
    regex: str | None = None
    """The answer matches this expression."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Any other of vLLM's ``SamplingParams``."""

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        if (self.json_schema is not None) + self.json_object + (self.regex is not None) > 1:
            raise ConfigError("Give one of json_schema, json_object and regex: an answer can have one form only.")

    def given(self) -> dict[str, Any]:
        """What is not left to the model, of the settings that OpenAI and vLLM name alike."""
        return {name: value for name in _NAMED_ALIKE if (value := getattr(self, name)) is not None}

    @property
    def constrained(self) -> bool:
        """Whether the answer's form is prescribed."""
        return self.json_schema is not None or self.json_object or self.regex is not None

    @classmethod
    def of(cls, settings: Sampling | Mapping[str, Any] | None) -> Sampling:
        """From keyword-like settings; an OpenAI ``response_format`` among them is understood.

        Raises:
            ConfigError: an unknown name (the nearest known one is named) or an unusable ``response_format``.
        """
        if isinstance(settings, Sampling):
            return settings
        values = {name: value for name, value in (settings or {}).items() if value is not None}
        values.update(form_of(values.pop("response_format", None)))
        known = [each.name for each in fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
                raise ConfigError(f"Unknown sampling setting {name!r}. {hint}")
        return cls(**values)


def form_of(response_format: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings of ``Sampling`` that an OpenAI ``response_format`` asks for.

    Raises:
        ConfigError: a type other than ``text``, ``json_object`` and ``json_schema``, or no schema.
    """
    kind = (response_format or {"type": "text"}).get("type")
    if response_format is None or kind == "text":
        return {}
    if kind == "json_object":
        return {"json_object": True}
    described = response_format.get("json_schema")
    if kind != "json_schema" or not isinstance(described, Mapping):
        raise ConfigError(f"response_format is {dict(response_format)!r}; give type text, json_object or json_schema.")
    schema = described.get("schema", described.get("json_schema"))
    if not isinstance(schema, Mapping):
        raise ConfigError("response_format of type json_schema holds no schema: give json_schema={'schema': {…}}.")
    return {"json_schema": dict(schema)}


__all__ = ["Sampling", "form_of"]
