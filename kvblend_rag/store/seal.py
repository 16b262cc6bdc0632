"""Seal: encryption at rest with AES-256-GCM, which also tells what somebody else wrote."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from pathlib import Path
from typing import Any

from kvblend_rag.errors import ConfigError, StoreError

_KEY_BYTES = 32
_NONCE_BYTES = 12
_ID_BYTES = 4


class Sealed(StoreError):
    """Something was encrypted with another key, or this store was opened without one."""


class Seal:
    """A key, and what can be done with it. Every text is sealed under a nonce of its own, 96 random bits.

    Args:
        key: 32 bytes.

    Raises:
        ConfigError: the package ``cryptography`` is missing, or the key has another length.
    """

    def __init__(self, key: bytes) -> None:
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ModuleNotFoundError as error:
            raise ConfigError(
                "Encryption needs the package cryptography: pip install 'kvblend-rag[encryption]'."
            ) from error
        if len(key) != _KEY_BYTES:
            raise ConfigError(f"The encryption key has {len(key)} bytes, and must have {_KEY_BYTES}.")
        self._cipher: Any = AESGCM(key)
        self._invalid = InvalidTag
        self.key_id = hashlib.blake2b(key, digest_size=_ID_BYTES, person=b"kvblend-key-id").digest()
        """4 bytes that tell this key from others and nothing about it."""

    @classmethod
    def from_source(cls, source: str) -> Seal:
        """The key that a setting names.

        Args:
            source: ``env:NAME`` or ``file:PATH``; there stand 64 hexadecimal digits, base64 of 32 bytes, or, in a
                file, the 32 bytes themselves.

        Raises:
            ConfigError: there is no such variable or file, or what stands there is no key.
        """
        kind, _, name = source.partition(":")
        if kind == "env" and name:
            text = os.environ.get(name, "").encode()
        elif kind == "file" and name:
            try:
                text = Path(name).read_bytes()
            except OSError as error:
                raise ConfigError(f"The encryption key {source} can't be read: {error.strerror}.") from error
        else:
            raise ConfigError("encryption_key must be env:NAME or file:PATH, and not the key itself.")
        return cls(_decoded(text, source))

    def seal(self, text: bytes, context: bytes) -> bytes:
        """Nonce, ciphertext and tag; 28 bytes more than the text.

        Args:
            text: what is encrypted.
            context: must be the same when it is opened.
        """
        nonce = os.urandom(_NONCE_BYTES)
        sealed: bytes = self._cipher.encrypt(nonce, text, context)
        return nonce + sealed

    def open(self, sealed: bytes | memoryview, context: bytes) -> bytes | None:
        """The text; None when it was not sealed with this key for this context."""
        view = memoryview(sealed)
        try:
            text: bytes = self._cipher.decrypt(bytes(view[:_NONCE_BYTES]), view[_NONCE_BYTES:], context)
        except (self._invalid, ValueError):
            return None
        return text

    def __repr__(self) -> str:
        return f"Seal({self.key_id.hex()})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Seal) and other.key_id == self.key_id

    def __hash__(self) -> int:
        return hash(self.key_id)


def _decoded(text: bytes, source: str) -> bytes:
    if len(text) == _KEY_BYTES:
        return text
    stripped = text.strip()
    for decode in (binascii.unhexlify, lambda value: base64.b64decode(value, validate=True)):
        try:
            key = decode(stripped)
        except ValueError:
            continue
        if len(key) == _KEY_BYTES:
            return key
    raise ConfigError(
        f"{source} holds no encryption key: give 64 hexadecimal digits, as `openssl rand -hex 32` prints them, or "
        "base64 of 32 bytes."
    )


__all__ = ["Seal", "Sealed"]
