"""BlendConfig: every setting, from keyword arguments, the environment, or a YAML file.

Precedence: keyword arguments (and vLLM's ``kv_connector_extra_config``), then ``KVBLEND_*``
variables, then the YAML file named by ``KVBLEND_CONFIG_FILE``, then the defaults below.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from kvblend_rag.address import RemoteAddress
from kvblend_rag.errors import ConfigError

CONFIG_FILE_VARIABLE = "KVBLEND_CONFIG_FILE"
_PREFIX = "KVBLEND_"

_REQUEST_OPTIONS = {
    "blend": "enable_blending",
    "selector": "selector",
    "ratio": "recompute_ratio",
    "span": "span_size",
    "layers": "score_layers",
    "coverage": "coverage",
    "full_prefill_share": "full_prefill_share",
    "carry": "carry",
    "max_risk": "max_risk",
    "on_risk": "on_risk",
    "second_opinion": "second_opinion",
    "second_opinion_streams": "second_opinion_streams",
    "planner": "planner",
    "tenant": "tenant",
}
"""A request's options, and the settings they stand for."""

IngestContextKind = Literal["none", "bos", "header", "document", "long", "similar"]
ScoreLayers = Literal["later", "all", "upper", "middle"]


def _cache_home() -> str:
    return os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")


def _default_store() -> str:
    return str(Path(_cache_home()) / "kvblend" / "store")


@dataclass(frozen=True, kw_only=True)
class BlendConfig:
    """Settings of the chunk store and of blending. Immutable, picklable, printable."""

    model: str = ""
    """Folder or hub name of the model; may be given where the engine is made instead."""

    base_url: str = ""
    """Address of a server started by ``kvblend serve``, as ``http://host:8000/v1``: no engine is started here then;
    store and defaults are the server's."""

    engine_args: dict[str, Any] = field(default_factory=dict)
    """Any of vLLM's engine arguments, as ``max_model_len: 4096``."""

    enable_blending: bool = True
    """Off: every request is an ordinary prefill; ingest still works."""

    chunk_size: int = 256
    """Longest chunk, in tokens; a longer text is split at natural boundaries."""

    local_device: Literal["cpu", "disk"] = "cpu"
    """``cpu`` keeps chunks in host memory in front of the disk; ``disk`` reads them from disk each time."""

    store_path: str = field(default_factory=_default_store)
    """Folder of the chunk store; created when missing."""

    max_memory_gb: float = 4.0
    """Bound of the host-memory tier, in GiB; with CUDA page-locked, where a chunk takes the next power of two."""

    max_device_gb: float = 0.0
    """GPU memory for chunks that are asked for again and again, in GiB; taken from vLLM's KV cache."""

    max_disk_gb: float = 50.0
    """Bound of the disk tier, in GiB."""

    eviction: Literal["lru", "lfu"] = "lru"
    """Which chunks leave memory and disk at their bounds: those used longest ago, or those used least often
    (each use is worth a day of age)."""

    remote: tuple[str, ...] = ()
    """Tiers behind the disk that hosts share, the fastest first: ``redis://host:port?max_gb=64``,
    ``s3://bucket/prefix?max_gb=500``; then the disk is a cache, and the last of these is what must keep a chunk."""

    encoding: Literal["none", "fp8", "int8", "int4"] = "none"
    """How KV lies on disk, in remote tiers and, for a GPU, in memory: as computed, or with 8 or 4 bits a value."""

    encryption_key: str = ""
    """Encrypts chunk files and token ids at rest (AES-256-GCM): ``env:NAME`` or ``file:PATH``, where the key stands."""

    selector: str = "question"
    """Which reused tokens are recomputed: ``none``, ``everything``, ``first``, ``deviation``, ``question``."""

    recompute_ratio: float = 0.15
    """Share of the reused tokens that is recomputed, 0 to 1; with ``coverage`` below 1, at most."""

    coverage: float = 1.0
    """Recompute no more once the recomputed tokens hold this share of the selector's score, 0 to 1;
    1: spend the whole ``recompute_ratio``."""

    full_prefill_share: float = 1.0
    """With ``coverage`` below 1: a request whose covering needs more than this share of the reused tokens
    gets a full prefill, which is cheaper then, and exact."""

    carry: float = 0.0
    """Share of what recomputing changes in a chunk's tokens, on average, by which its other tokens are changed too,
    0 to 1; 0: they stay as stored."""

    max_risk: float = 1.0
    """A blended answer whose estimated risk of differing is above this is not shown, 0 to 1; 1: risk is not judged."""

    on_risk: Literal["prefill", "mark"] = "prefill"
    """What becomes of a risky answer: ``prefill`` computes the prompt in full instead, before the first token is
    shown; ``mark`` shows it, with a reason in its report."""

    second_opinion: float = 0.5
    """With ``max_risk`` below 1, where the whole answer is waited for: it is asked for once more with this share
    recomputed, 0 to 1, if that can turn the judgement; how far it disputes the first is a signal. 0: no second one."""
    second_opinion_streams: bool = False
    """A streamed answer has one too: its first eight tokens are held back until as many of the second are there."""

    planner: bool = True
    """Load a chunk only where that is faster than computing its tokens, as measured on this machine, and blend only
    where the prompt is answered sooner for it; off: everything that is found is loaded."""

    heed_verdict: bool = True
    """Follow what ``kvblend calibrate`` found out: its settings where these have their defaults, or no blending."""

    span_size: int = 16
    """Tokens are recomputed in spans of this length."""

    score_layers: ScoreLayers = "later"
    """The layers whose attention the ``question`` selector goes by: the last two thirds, all, the upper half or the
    middle third."""

    min_run: int = 16
    """A shorter run of chunk tokens in a prompt is computed, not reused."""

    ingest_context: IngestContextKind = "long"
    """What a chunk's KV is computed behind: nothing, the first special token, the prompt's header,
    the header and a generic document, the header and three of them, or the header, two of them and the tenant's chunk
    that is most like this one (part of the chunk's key)."""

    ingest_documents: tuple[str, ...] = ()
    """Text files with up to three documents of the application's own, to stand in the ingest context in place of the
    generic ones (part of the chunk's key)."""

    ingest_openings: bool = False
    """Store each chunk a second time, computed behind the header alone, for prompts in which it stands first: nearer
    to a full prefill, for twice the ingest and the store (the second one counts as a chunk of its own)."""

    system_prompt: str | None = None
    """System text of the header in the ingest context; give the application's own for the best answers."""

    tenant: str = ""
    """Chunks of one tenant are invisible to all others."""

    learn_seen: bool = False
    """In a server: precompute, when it is idle, what comes again and again in prompts and was never ingested."""

    seen_times: int = 3
    """With ``learn_seen``: in how many prompts a text must have stood."""

    @classmethod
    def load(cls, path: str | Path | None = None, **overrides: Any) -> BlendConfig:
        """The effective configuration.

        Raises:
            ConfigError: an unknown key (the nearest known one is named), a value of the wrong type
                or out of range, or a file that can't be read.
        """
        file = path if path is not None else os.environ.get(CONFIG_FILE_VARIABLE)
        values: dict[str, Any] = {}
        if file:
            values.update(cls._checked(_read_yaml(Path(file)), f"in {file}"))
        values.update(cls._checked(_from_environment(cls), "in the environment", parse=True))
        values.update(cls._checked(overrides, "among the arguments"))
        return cls(**values)

    def replace(self, **changes: Any) -> BlendConfig:
        """A copy with some settings changed, checked like any other input."""
        return dataclasses.replace(self, **self._checked(changes, "among the arguments"))

    def for_request(self, options: Mapping[str, Any]) -> BlendConfig:
        """The settings of one request.

        Args:
            options: ``blend`` (false: an ordinary prefill), ``exact`` (true: everything is recomputed, as with
                ``selector: everything``), ``selector``, ``ratio``, ``span``, ``layers``, ``coverage``,
                ``full_prefill_share``, ``carry``, ``max_risk``, ``on_risk``, ``second_opinion``,
                ``second_opinion_streams``, ``planner``, ``tenant``.

        Raises:
            ConfigError: an unknown option, or a value that can't be used.
        """
        if not options:
            return self
        options = dict(options)
        exact = options.pop("exact", False)
        if not isinstance(exact, bool):
            raise ConfigError(f"The blending option exact is {exact!r}, and must be true or false.")
        if exact:
            options["selector"] = "everything"
            options["planner"] = False  # it would find that an ordinary prefill is cheaper
        unknown = [name for name in options if name not in _REQUEST_OPTIONS]
        if unknown:
            near = difflib.get_close_matches(unknown[0], _REQUEST_OPTIONS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(_REQUEST_OPTIONS)}."
            raise ConfigError(f"A request has no blending option {unknown[0]!r}; {hint}")
        return self.replace(**{_REQUEST_OPTIONS[name]: value for name, value in options.items()})

    def to_dict(self) -> dict[str, Any]:
        """Every setting with its effective value, JSON-able."""
        return dataclasses.asdict(self)

    def connector_settings(self) -> dict[str, Any]:
        """The part of the settings that travels to vLLM's processes."""
        return {
            name: value for name, value in self.to_dict().items() if name not in ("model", "base_url", "engine_args")
        }

    def __post_init__(self) -> None:
        for name, low, high in (
            ("chunk_size", 16, 65_536),
            ("max_memory_gb", 0, 1e6),
            ("max_device_gb", 0, 1e6),
            ("max_disk_gb", 0, 1e9),
            ("recompute_ratio", 0, 1),
            ("coverage", 0, 1),
            ("full_prefill_share", 0, 1),
            ("carry", 0, 1),
            ("max_risk", 0, 1),
            ("second_opinion", 0, 1),
            ("span_size", 1, 4_096),
            ("min_run", 1, 65_536),
            ("seen_times", 2, 1_000),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name} is {value}, and must lie between {low} and {high:g}.")

        for url in self.remote:
            RemoteAddress.parse(url)

    @classmethod
    def _checked(cls, given: Mapping[str, Any], where: str, parse: bool = False) -> dict[str, Any]:
        hints = _hints()
        checked = {}
        for name, value in given.items():
            if name not in hints:
                near = difflib.get_close_matches(name, hints, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else f" Known keys: {', '.join(sorted(hints))}."
                raise ConfigError(f"Unknown key {name!r} {where}.{hint}")
            if parse and hints[name] not in (str, str | None):
                value = _parsed(value, f"{_PREFIX}{name.upper()} {where}")
            checked[name] = _as_type(name, value, hints[name], where)
        return checked


def as_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as the options of a request, those that it has no option for left out."""
    return {option: settings[name] for option, name in _REQUEST_OPTIONS.items() if name in settings}


@cache
def _hints() -> dict[str, Any]:
    """Types by setting; resolving them takes 0.4 ms, and every request's options are checked by them."""
    return get_type_hints(BlendConfig)


def _from_environment(config: type[BlendConfig]) -> dict[str, str]:
    names = {_PREFIX + f.name.upper(): f.name for f in dataclasses.fields(config)}
    return {name: os.environ[variable] for variable, name in names.items() if variable in os.environ}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"The configuration file {path} can't be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"The configuration file {path} is not YAML: {error}") from error
    loaded = _parsed(text, f"The configuration file {path}")
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"The configuration file {path} must hold `key: value` lines.")
    return {str(key): value for key, value in loaded.items()}


def _parsed(text: str, what: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # dates and nesting raise what is no YAMLError
        raise ConfigError(f"{what} is not YAML: {error}".splitlines()[0]) from error


def _as_type(name: str, value: Any, kind: Any, where: str) -> Any:
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise ConfigError(f"{name} {where} is {value!r}, and must be one of {', '.join(get_args(kind))}.")
    if get_origin(kind) is dict:
        if isinstance(value, dict):
            return dict(value)
        raise ConfigError(f"{name} {where} is {value!r}, and must hold `key: value` lines.")
    if kind == tuple[str, ...]:
        texts = (value,) if isinstance(value, str) else value
        if isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts):
            return tuple(texts)
        raise ConfigError(f"{name} {where} is {value!r}, and must be a text or a list of texts.")
    if kind is float and type(value) is int:
        return float(value)
    wanted = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "text")
    fits = value is None or isinstance(value, str) if kind == str | None else type(value) is kind
    if not fits:
        raise ConfigError(f"{name} {where} is {value!r}, and must be {wanted}.")
    return value


__all__ = ["CONFIG_FILE_VARIABLE", "BlendConfig", "IngestContextKind", "ScoreLayers", "as_options"]
