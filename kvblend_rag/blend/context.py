"""The ingest context: what a chunk's KV is computed behind.

A chunk that is computed as the first thing in a context behaves as the first thing; computed behind
the prompt's header and *some* document it behaves like one document among several. That wins back a
quarter and more of what reuse loses, at no cost when a prompt is answered (docs/quality.md). Behind three
documents it behaves more like one deep in a prompt, which is where most chunks stand. The last of the three may be
the chunk's own companion (``blend.companions``), with which it is likely to share a prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from kvblend_rag.blend.chunk import TokenIds, as_token_ids
from kvblend_rag.config import IngestContextKind
from kvblend_rag.errors import ConfigError

CONTEXT_TOKENS = 256
"""The whole context's length: a multiple of vLLM's block sizes, so that all of it is a prefix-cache hit
for every chunk but the first."""

COMPANION_TOKENS = CONTEXT_TOKENS
"""The last tokens of a ``similar`` context: a generic document, where a chunk has no companion."""

_LEAST_LETTERS = 100
"""Of a document of the application's own: with less there is no document to stand behind."""

_MARK = "KVBLENDMARK"
_GENERIC_DOCUMENT = (
    "Water freezes at zero degrees and boils at one hundred degrees under normal pressure. Many towns were "
    "founded beside rivers because water was needed for drinking, farming and trade. Bread is made from "
    "flour, water, salt and yeast, and it has been baked for thousands of years. A bridge carries a road or "
    "a railway over an obstacle such as a valley or a stream. Trees grow taller in places with much rain, "
    "and their rings show how old they are. A library lends books, and a reader brings them back after some "
    "weeks. Sheep are kept for wool, milk and meat, and a shepherd looks after the flock. Glass is made by "
    "melting sand, soda and lime in a furnace. Ships used to carry spices, cloth and tea from one port to "
    "another, and a voyage could take many months. In winter the days are short and the nights are long. A "
    "mill grinds grain between two stones, which are turned by wind or by water. Clay is shaped into pots "
    "and plates, dried in the air and fired in a kiln. Letters were once written by hand and carried by "
    "riders, later by trains and then by aeroplanes. A garden needs light, water and patience, and most "
    "seeds are sown in spring."
)
_MORE_DOCUMENTS = (
    "A clock keeps time with a pendulum, a spring or a crystal, and it has to be wound or fed now and then. Salt "
    "was once so precious that roads were named after it. Wool is washed, combed, spun and woven before it becomes "
    "cloth. A lighthouse warns ships of rocks, and its keeper used to trim the lamp every few hours. Cheese is made "
    "from milk that has been curdled, pressed and left to ripen in a cool place. The moon causes the tides, which "
    "rise and fall twice a day on most coasts. A carpenter measures twice and cuts once. Paper was made from rags "
    "before it was made from wood, and a good sheet lasts for centuries. Bees visit flowers for nectar and carry "
    "pollen from one to the next. Coal was dug from deep seams and brought up in baskets, later by steam. A letter "
    "needs an address, and a parcel needs string. Many rivers begin as a spring in the hills and end in the sea.",
    "A map shows roads, rivers and hills at a smaller scale, and north is usually at the top. Rice grows in flooded "
    "fields and wheat in dry ones. An orchestra tunes to one note before it begins to play. Iron rusts in damp air "
    "unless it is painted or oiled. A market is held on the same day each week, and farmers bring what is in season. "
    "Snow falls when the air is cold enough, and it melts from the bottom on warm ground. A tailor makes a coat to "
    "measure, and a cobbler mends shoes. Stone walls stand without mortar if they are built with care. Birds fly "
    "south in autumn and come back in spring, often to the same nest. A telescope gathers light with a lens or a "
    "mirror. Soap is made from fat and lye, and it was boiled in large kettles. Children learn to count before they "
    "learn to write, and most of them like to be read to in the evening.",
)


class Tokenizer(Protocol):
    """What is asked of a tokenizer; those of Transformers fit."""

    bos_token_id: int | None
    bos_token: str | None
    chat_template: Any

    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]: ...  # noqa: D102

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...  # noqa: D102


def ingest_context(
    kind: IngestContextKind,
    tokenizer: Tokenizer,
    system_prompt: str | None = None,
    documents: Sequence[str] = (),
) -> list[int]:
    """Token ids of the context that a chunk is computed behind.

    Args:
        kind: ``none``; ``bos``, the first special token; ``header``, what the chat template puts in front
            of the user's text; ``document``, the header and a document, cut to
            ``CONTEXT_TOKENS`` (or the next multiple, behind a long header); ``long``, the header and three
            documents, cut to three times that; ``similar``, as long, with the third document cut to
            ``COMPANION_TOKENS``, which ``beside`` puts a companion in place of.
        tokenizer: the model's.
        system_prompt: the application's system text; None leaves the template's own default.
        documents: the application's own, of which the first (``document``) or the first three (``long``) stand
            where the generic ones would, each cut to ``CONTEXT_TOKENS``.
    """
    if kind == "none":
        return []
    if kind == "bos":
        return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    header = tokenizer.encode(_header(tokenizer, system_prompt), add_special_tokens=False)
    if kind == "header":
        return header
    separator = tokenizer.encode("\n\n", add_special_tokens=False)
    count = 1 if kind == "document" else 3
    texts = list(documents[:count] or (*_MORE_DOCUMENTS, _GENERIC_DOCUMENT)[-count:])
    if kind == "similar" and len(texts) == 1:
        texts *= 2
    # At least half of a passage stays, whatever the header's length.
    least = len(header) + len(separator) + (2 * len(texts) - 1) * CONTEXT_TOKENS // 2
    total = -(-least // CONTEXT_TOKENS) * CONTEXT_TOKENS
    ending: list[int] = []
    if kind == "similar":
        generic = _start_of(texts.pop(), tokenizer)
        ending = [*_filled(generic, COMPANION_TOKENS - len(separator)), *separator]
    if documents:
        first, *more = (_start_of(text, tokenizer) for text in texts)
        document = [*first, *(token for tokens in more for token in (*separator, *tokens))]
    else:
        document = tokenizer.encode("\n\n".join(texts), add_special_tokens=False)
    room = total - len(header) - len(separator) - len(ending)
    return [*header, *_filled(document, room), *separator, *ending]


def beside(context: Sequence[int] | TokenIds, companion: TokenIds, separator: Sequence[int] | TokenIds) -> TokenIds:
    """A ``similar`` context with a chunk's companion in it.

    Args:
        context: token ids, as ``ingest_context`` makes them.
        companion: token ids; its first ones stand in the context, behind the end of the generic document where it is
            a short one.
        separator: token ids of what stands between documents.

    Returns:
        Token ids, int32, as many as before.
    """
    generic = as_token_ids(context)[-COMPANION_TOKENS:]
    own = [*companion[: COMPANION_TOKENS - len(separator)], *separator]
    return as_token_ids([*context[:-COMPANION_TOKENS], *generic[len(own) :], *own])


def own_documents(paths: Iterable[str]) -> list[str]:
    """The texts of files, in their order, for ``ingest_context``.

    Raises:
        ConfigError: a file can't be read as text, or has too little of it.
    """
    texts = []
    for path in paths:
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{path}, named in ingest_documents, can't be read as text ({error}): name a text file that every "
                "process of the engine can read."
            ) from error
        if len(text) < _LEAST_LETTERS:
            raise ConfigError(
                f"{path}, named in ingest_documents, has {len(text)} letters: name a document of {_LEAST_LETTERS} "
                "or more."
            )
        texts.append(text)
    return texts


def _filled(document: Sequence[int], room: int) -> list[int]:
    """The end of a document of so many tokens, or of the same one several times."""
    return (list(document) * (-(-room // len(document))))[-room:]


def _start_of(text: str, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)[:CONTEXT_TOKENS]


def _header(tokenizer: Tokenizer, system_prompt: str | None) -> str:
    user = {"role": "user", "content": _MARK}
    if not getattr(tokenizer, "chat_template", None):
        return (tokenizer.bos_token or "") + (f"{system_prompt}\n\n" if system_prompt else "")
    attempts = [[{"role": "system", "content": system_prompt}, user]] if system_prompt else []
    merged = {"role": "user", "content": f"{system_prompt}\n\n{_MARK}" if system_prompt else _MARK}
    for messages in [*attempts, [merged]]:
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception:  # a template without a system role raises an error of its own kind
            continue
        if _MARK in text:
            return text.split(_MARK)[0]
    return tokenizer.bos_token or ""


__all__ = ["COMPANION_TOKENS", "CONTEXT_TOKENS", "Tokenizer", "beside", "ingest_context", "own_documents"]
