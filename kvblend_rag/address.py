"""RemoteAddress: the URL that names a remote tier, its bound and its timeout."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import SplitResult, parse_qs, urlsplit

from kvblend_rag.errors import ConfigError

_GIB = 1 << 30
_VALKEY = ("redis", "rediss", "valkey", "valkeys", "unix")
_OPTIONS = {"s3": {"max_gb", "timeout_s", "endpoint", "region"}, "valkey": {"max_gb", "timeout_s", "prefix"}}


@dataclass(frozen=True)
class RemoteAddress:
    """A remote tier, as its URL names it.

    ::

        redis://[user:password@]host[:port][/database][?max_gb=64][&timeout_s=5][&prefix=kvblend]
        s3://bucket[/prefix][?endpoint=https://…][&region=…][&max_gb=64][&timeout_s=5]
    """

    url: SplitResult
    """Without the options."""
    options: dict[str, str]
    max_bytes: int
    timeout_s: float
    """The longest that a call to the server takes."""

    @property
    def tier(self) -> str:
        """The tier's name in reports."""
        return "s3" if self.url.scheme == "s3" else "valkey"

    @classmethod
    def parse(cls, text: str) -> RemoteAddress:
        """Read a URL.

        Raises:
            ConfigError: another scheme, an unknown option, or a value that can't be used.
        """
        shown = without_password(text)
        try:
            url = urlsplit(text)
        except ValueError as error:
            raise ConfigError(f"The remote tier {shown!r} is no URL: {error}.") from error
        if url.scheme not in ("s3", *_VALKEY) or not (url.netloc or url.scheme == "unix"):
            raise ConfigError(
                f"The remote tier {shown!r} can't be used: give redis://host:port, rediss://host:port or s3://bucket/prefix."
            )
        given = {name: values[-1] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        known = _OPTIONS["s3" if url.scheme == "s3" else "valkey"]
        unknown = sorted(given.keys() - known)
        if unknown:
            raise ConfigError(
                f"The remote tier {shown!r} has no option {unknown[0]!r}; known are {', '.join(sorted(known))}."
            )
        numbers = {}
        for name, default in (("max_gb", 50.0), ("timeout_s", 5.0)):
            try:
                numbers[name] = float(given.pop(name, default))
            except ValueError:
                numbers[name] = -1.0
            if not 0 < numbers[name] < 1e9:
                raise ConfigError(f"{name} of the remote tier {shown!r} must be a number above 0.")
        return cls(url._replace(query="", fragment=""), given, int(numbers["max_gb"] * _GIB), numbers["timeout_s"])


def without_password(url: str) -> str:
    """A URL as it may be shown."""
    scheme, separator, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    user, at, host = authority.rpartition("@")
    if not separator or not at:
        return url
    return f"{scheme}://{user.partition(':')[0]}:…@{host}{slash}{path}"


__all__ = ["RemoteAddress", "without_password"]
