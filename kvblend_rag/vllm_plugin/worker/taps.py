"""Taps: stand between a scattered forward and its attention layers.

The attention op looks its layer up in the forward context at run time (vllm/model_executor/layers/
attention/attention.py), eager or compiled. A context whose layers are proxies therefore waits for loads,
sees queries and ends early without a patch, and is gone when the forward ends.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import MLAAttention


class _Stop(Exception):
    """Leaves the model when the last layer of interest has been seen."""


class _TappedLayer:
    """An attention layer that asks before it writes its KV, shows its new KV then, and its query before it attends."""

    def __init__(
        self,
        layer: Any,
        before: Callable[[], None],
        see: Callable[[torch.Tensor], None],
        see_new: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
    ) -> None:
        self._layer, self._before, self._see, self._see_new = layer, before, see, see_new
        self.impl = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def do_kv_cache_update(self, _layer: Any, key: torch.Tensor, value: torch.Tensor, *args: Any) -> None:
        # A load that came later would overwrite what is written here.
        self._before()
        if self._see_new is not None:
            self._see_new(key, value)
        self._layer.impl.do_kv_cache_update(self._layer, key, value, *args)

    def forward(self, _layer: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self._see(query)
        return self._layer.impl.forward(self._layer, query, *args, **kwargs)


class _TappedLatentLayer(_TappedLayer):
    """The same of ``MLAAttention``, of which vLLM asks more than its implementation."""

    def do_kv_cache_update(self, *args: Any, **kwargs: Any) -> None:
        self._before()
        self._layer.impl.do_kv_cache_update(*args, **kwargs)

    def update_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        self._before()
        self._layer.update_kv_cache(*args, **kwargs)

    def forward_impl(self, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self._see(query)
        return self._layer.forward_impl(query, *args, **kwargs)


class Taps:
    """A context manager to enter inside a forward context; may be entered again for the next forward.

    Args:
        order: all attention layers, in the order in which they run.
        before: called with a layer's name before it writes its KV.
        see: layers whose queries are collected; the forward ends when the last of them has written its KV
            and shown its query, which saves the layers behind it.
        whole: do not end it.
        see_new: called with a layer's name and its new keys and values, each (tokens or more, kv_heads, head_dim),
            before they are written; not of layers that keep a latent in their place.
    """

    def __init__(
        self,
        order: Sequence[str],
        before: Callable[[str], None],
        see: Collection[str] = (),
        *,
        whole: bool = False,
        see_new: Callable[[str, torch.Tensor, torch.Tensor], None] | None = None,
    ) -> None:
        self._order, self._before, self._see_new = list(order), before, see_new
        self.queries: dict[str, list[torch.Tensor]] = {name: [] for name in order if name in see}
        """(tokens, heads, head_dim) of each forward that was run inside."""
        self._last = None if whole else next(reversed(self.queries), None)

    def __enter__(self) -> Taps:
        self._context = self._entered()
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._context.__exit__(*error)

    @contextmanager
    def _entered(self) -> Iterator[None]:
        context = get_forward_context()
        layers = {name: context.no_compile_layers[name] for name in self._order}
        tapped = {
            name: (_TappedLatentLayer if isinstance(layer, MLAAttention) else _TappedLayer)(
                layer, self._waits(name), self._sees(name), self._sees_new(name)
            )
            for name, layer in layers.items()
        }
        context.no_compile_layers = {**context.no_compile_layers, **tapped}
        try:
            yield
        except _Stop:
            return

    def _waits(self, name: str) -> Callable[[], None]:
        return lambda: self._before(name)

    def _sees_new(self, name: str) -> Callable[[torch.Tensor, torch.Tensor], None] | None:
        see = self._see_new
        return None if see is None else lambda keys, values: see(name, keys, values)

    def _sees(self, name: str) -> Callable[[torch.Tensor], None]:
        def see(query: torch.Tensor) -> None:
            if name in self.queries:
                # A CUDA graph's query is longer than the forward, and overwritten by the next layer's.
                tokens = len(get_forward_context().slot_mapping[name])
                self.queries[name].append(query[:tokens].clone())
            if name == self._last:
                raise _Stop

        return see


__all__ = ["Taps"]
