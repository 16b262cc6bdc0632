"""What each encoding at rest saves and costs, on the KV of a store."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from rich.table import Table

from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import ConfigError
from kvblend_rag.store import DiskStore, layout_of, open_catalogue
from kvblend_rag.store.encoding import ENCODINGS, Encoding, decode, encode


def run(config: BlendConfig, chunks: int = 32) -> dict[str, Any]:
    """Encode and decode stored chunks.

    Args:
        config: names the store, whose chunks were stored as computed.
        chunks: how many are read, at most.

    Returns:
        JSON-able: ``settings`` and, by encoding, ``rows``: ``bytes_per_token``, ``times_smaller``, the relative errors
        of keys and values (root of the summed squares, over all chunks; the median and the largest chunk's) and
        ``decode_ms_per_1k_tokens`` on this CPU.

    Raises:
        ConfigError: the store holds no chunk of one rank.
    """
    catalogue = open_catalogue(config)
    keys = sorted(row.key for row in catalogue.rows() if row.shard_count == 1)[:chunks]
    catalogue.close()
    if not keys:
        raise ConfigError(f"{config.store_path} holds no chunks to measure on: `kvblend ingest DIR` makes some.")
    store = DiskStore(layout_of(config))
    read = [store.get(key) for key in keys]
    tokens = sum(kv.shape[2] for kv in read)
    facts = {"chunks": len(read), "tokens": tokens, "dtype": str(read[0].dtype), "shape": list(read[0].shape)}
    return {"settings": facts, "rows": {encoding: _measured(read, tokens, encoding) for encoding in ENCODINGS}}


def table(result: dict[str, Any]) -> Table:
    """What ``run`` returned, to be printed."""
    settings = result["settings"]
    shown = Table(
        "encoding", "bytes a token", "smaller", "error of keys", "of values", "decode, ms for 1k tokens",
        title=f"{settings['chunks']} chunks, {settings['tokens']:,} tokens, {settings['dtype']}",
    )  # fmt: skip
    for column in shown.columns[1:]:
        column.justify = "right"
    for name, row in result["rows"].items():
        errors = (f"{row[part]['median']:.4f} (worst {row[part]['max']:.4f})" for part in ("keys", "values"))
        shown.add_row(
            name,
            f"{row['bytes_per_token']:,.0f}",
            f"{row['times_smaller']:.2f}×",
            *errors,
            f"{row['decode_ms_per_1k_tokens']:.1f}",
        )
    return shown


def _measured(read: list[torch.Tensor], tokens: int, encoding: Encoding) -> dict[str, Any]:
    nbytes, seconds = 0, 0.0
    errors: dict[str, list[float]] = {"keys": [], "values": []}
    for kv in read:
        tensors = encode(kv, encoding)
        nbytes += sum(tensor.nbytes for tensor in tensors.values())
        began = time.perf_counter()
        back = decode(tensors, encoding, kv.dtype)
        seconds += time.perf_counter() - began
        for index, part in enumerate(errors):
            true = kv[:, index].float()
            errors[part].append(float((back[:, index].float() - true).norm() / true.norm()))
    return {
        "bytes_per_token": nbytes / tokens,
        "times_smaller": sum(kv.nbytes for kv in read) / nbytes,
        "decode_ms_per_1k_tokens": seconds * 1e6 / tokens,
        **{part: {"median": statistics.median(found), "max": max(found)} for part, found in errors.items()},
    }


__all__ = ["run", "table"]
