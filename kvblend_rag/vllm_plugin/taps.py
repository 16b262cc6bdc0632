"""Taps: look into the attention layers during a scattered forward, and stop it early.

The attention op looks its layer up in the forward context at run time (vllm/model_executor/layers/
attention/attention.py), eager or compiled. A context whose layers are proxies therefore sees every
query without a patch, and is gone when the forward ends.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.forward_context import get_forward_context


class _Stop(Exception):
    """Leaves the model when the last tapped layer has been seen."""


class _TappedLayer:
    """An attention layer whose ``impl`` reports the query before it attends."""

    def __init__(self, layer: Any, see: Callable[[torch.Tensor], None], last: bool) -> None:
        self._layer, self._see, self._last = layer, see, last
        self.impl = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def do_kv_cache_update(self, _layer: Any, *args: Any) -> None:
        self._layer.impl.do_kv_cache_update(self._layer, *args)

    def forward(self, _layer: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self._see(query)
        if self._last:
            raise _Stop
        return self._layer.impl.forward(self._layer, query, *args, **kwargs)


class Taps:
    """Collects the queries of some layers; a context manager to enter inside a forward context.

    Args:
        names: the layers to look at; the forward ends when the last of them has written its KV and shown
            its query, which saves the layers behind it.
        order: all attention layers in the order in which they run.
    """

    def __init__(self, names: Collection[str], order: list[str]) -> None:
        self._names = [name for name in order if name in names]
        self.queries: dict[str, list[torch.Tensor]] = {name: [] for name in self._names}
        """(tokens, heads, head_dim) of each forward that was run inside."""

    @contextmanager
    def _entered(self) -> Iterator[None]:
        context = get_forward_context()
        tapped = {
            name: _TappedLayer(
                context.no_compile_layers[name],
                self._see(name),
                last=name == self._names[-1],
            )
            for name in self._names
        }
        context.no_compile_layers = {**context.no_compile_layers, **tapped}
        try:
            yield
        except _Stop:
            return

    def _see(self, name: str) -> Callable[[torch.Tensor], None]:
        seen = self.queries[name]
        return lambda query: seen.append(query.clone())

    def __enter__(self) -> Taps:
        self._context = self._entered()
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._context.__exit__(*error)


__all__ = ["Taps"]
