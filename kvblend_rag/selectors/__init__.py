"""Selectors by name. Other packages add theirs under the entry point group ``kvblend.selectors``.

An entry point names a ``Selector`` class that takes no arguments. Nothing is imported before it is
asked for.
"""

from __future__ import annotations

import difflib
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from kvblend_rag.errors import ConfigError

if TYPE_CHECKING:
    from kvblend_rag.selectors.base import Selector

GROUP = "kvblend.selectors"

_BUILT_IN = {
    "none": "nothing:NothingSelector",
    "everything": "everything:EverythingSelector",
    "first": "first_tokens:FirstTokensSelector",
    "deviation": "deviation:DeviationSelector",
    "question": "question:QuestionSelector",
}


def names() -> list[str]:
    """The names of all selectors that are installed, sorted."""
    return sorted({*_BUILT_IN, *entry_points(group=GROUP).names})


def get_selector(name: str) -> Selector:
    """The selector of this name; a built-in one can't be replaced.

    Raises:
        ConfigError: an unknown name (the nearest known one is named), or an entry point that does not
            name a selector.
    """
    if name in _BUILT_IN:
        module, attribute = _BUILT_IN[name].split(":")
        selector: Selector = getattr(import_module(f"{__name__}.{module}"), attribute)()
        return selector
    for entry in entry_points(group=GROUP, name=name):
        return _from_entry_point(name, entry.load())
    near = difflib.get_close_matches(name, names(), n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Known ones: {', '.join(names())}."
    raise ConfigError(f"Unknown selector {name!r}. {hint}")


def _from_entry_point(name: str, loaded: object) -> Selector:
    from kvblend_rag.selectors.base import Selector

    if isinstance(loaded, type) and issubclass(loaded, Selector):
        return loaded()
    raise ConfigError(f"Entry point {name!r} of group {GROUP} is {loaded!r}, and must be a Selector class.")


__all__ = ["GROUP", "get_selector", "names"]
