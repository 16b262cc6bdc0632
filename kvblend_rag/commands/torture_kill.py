"""Writers killed at random instants, again and again, on one store: is what they acknowledged whole, is anything wrong?

Each round forks writers that ingest, evict, release and compact at random, and kills them with SIGKILL. They say what
they begin and what is done through a pipe, so that it is known what each was at when it died. Then the store is read
whole and compared with what it must hold. Every few rounds the catalogue is lost as well.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvblend_rag.blend.chunk import chunk_key
from kvblend_rag.errors import StoreError
from kvblend_rag.store import Catalogue, DiskStore, StoredChunk, StoreLayout
from kvblend_rag.store.listing import put_and_list
from kvblend_rag.store.upkeep import check, gc

_SPACE = "torture"
_SHARD = (0, 1)
_TOKENS = 64
_CHUNKS_A_WRITER = 40
_DOCUMENTS = 4
_KEPT_FILES = 30
_WORK = {"ingest": 12, "evict": 2, "release": 1, "compact": 1}
_LOSE_CATALOGUE_EVERY = 10


def run(
    root: Path, rounds: int = 100, writers: int = 2, seed: int = 0, advance: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Kill writers so many times.

    Args:
        root: an empty folder for the store.
        rounds: how often all writers are killed.
        writers: processes that write at the same time.
        seed: of what they do and when they die.
        advance: called after each round.

    Returns:
        JSON-able: ``rounds``; ``acknowledged`` chunks and how many of them were ``compared`` bit for bit;
        ``killed_during``, by what a writer was at; ``wrong``, a sentence a violation; counts of what was left behind
        and mended.
    """
    rng = random.Random(seed)
    found: dict[str, Any] = {"rounds": rounds, "writers": writers, "seed": seed, "acknowledged": 0, "compared": 0}
    died: Counter[str] = Counter()
    mended: Counter[str] = Counter()
    wrong: list[str] = []
    state = _State()
    Catalogue(root).close()
    for number in range(rounds):
        state.begin(_killed(root, writers, rng))
        died.update(state.under_way)
        found["acknowledged"] += len(state.acknowledged)
        if number % _LOSE_CATALOGUE_EVERY == _LOSE_CATALOGUE_EVERY - 1:
            for path in root.glob("catalogue.sqlite*"):
                path.unlink()
            mended["catalogues lost"] += 1
            state.catalogue_lost = True
        violations = _verify(root, state, found, mended)
        wrong += [f"round {number}: {each}" for each in violations]
        advance()
    return found | {"killed_during": dict(died), "mended": dict(mended), "wrong": wrong}


@dataclass
class _State:
    """What the store must hold, by what its writers said."""

    required: set[int] = field(default_factory=set)
    """Chunks that must be there."""
    holds: dict[str, set[int]] = field(default_factory=dict)
    """By document: the chunks it must hold."""
    acknowledged: set[int] = field(default_factory=set)
    under_way: list[str] = field(default_factory=list)
    """What the writers were at when they died."""
    ingesting: dict[str, set[int]] = field(default_factory=dict)
    """By document: chunks whose ingest was not acknowledged."""
    releasing: set[str] = field(default_factory=set)
    catalogue_lost: bool = False

    def begin(self, lines: list[list[str]]) -> None:
        """Take in what the writers said since the last kill, in the order in which it was said."""
        self.acknowledged, self.under_way, self.catalogue_lost = set(), [], False
        self.ingesting, self.releasing = {}, set()
        open_work: dict[str, tuple[int, list[str]]] = {}
        began: dict[int, int] = dict.fromkeys(self.required, -1)
        taken: dict[int, int] = {}
        for index, (phase, writer, work, *rest) in enumerate(lines):
            if phase == "begin":
                open_work[writer] = (index, [work, *rest])
                if work == "release":
                    self.required -= self.holds.get(rest[0], set())
                continue
            start, _ = open_work.pop(writer)
            if work == "ingest":
                document, chunk = rest[0], int(rest[1])
                began[chunk] = start
                self.acknowledged.add(chunk)
                self.required.add(chunk)
                self.holds.setdefault(document, set()).add(chunk)
            elif work == "release":
                self.holds.pop(rest[0], None)
            elif work == "evict":
                taken.update((int(chunk), index) for chunk in rest)
        # an eviction may have taken a chunk before its writer came to say that it was stored
        self.required -= {chunk for chunk, when in taken.items() if when > began.get(chunk, -1)}
        for _, (work, *rest) in open_work.values():
            self.under_way.append(work)
            if work == "evict":
                self.required.clear()  # nobody knows what it took
            elif work == "ingest":
                self.ingesting.setdefault(rest[0], set()).add(int(rest[1]))
            elif work == "release":
                self.releasing.add(rest[0])


def _killed(root: Path, writers: int, rng: random.Random) -> list[list[str]]:
    inlet, outlet = os.pipe()
    children = []
    for writer in range(writers):
        seed = rng.random()
        child = os.fork()
        if child == 0:
            try:
                os.close(inlet)
                _write(root, writer, random.Random(seed), outlet)
            finally:
                os._exit(1)
        children.append(child)
    os.close(outlet)
    with os.fdopen(inlet) as said:
        first = said.readline()  # they are at work
        for child in children:
            time.sleep(rng.random() * 0.2)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        lines = (first + said.read()).splitlines()
    return [line.split() for line in lines if line]


def _write(root: Path, writer: int, rng: random.Random, outlet: int) -> None:
    catalogue = Catalogue(root)
    store = DiskStore(root, catalogue=catalogue)
    numbers = {make(number).key: number for number in _numbers(writer)}

    def say(phase: str, *words: object) -> None:
        os.write(outlet, f"{phase} {writer} {' '.join(map(str, words))}\n".encode())

    while True:
        (work,) = rng.choices(list(_WORK), list(_WORK.values()))
        document = f"w{writer}-{rng.randrange(_DOCUMENTS)}"
        if work == "ingest":
            number = rng.choice(list(_numbers(writer)))
            document = f"w{writer}-{number % _DOCUMENTS}"
            say("begin", work, document, number)
            chunk = make(number)
            catalogue.hold(document, [chunk.key])
            put_and_list(store, catalogue, [chunk], _SHARD)
            say("end", work, document, number)
        elif work == "evict":
            say("begin", work)
            gone = store.evict(_KEPT_FILES * file_bytes())
            say("end", work, *(numbers.get(key, _number_of(key)) for key in gone))
        elif work == "release":
            say("begin", work, document)
            store.delete_unheld(catalogue.release(document))
            say("end", work, document)
        else:
            say("begin", work)
            gc(root)
            say("end", work)


def _verify(root: Path, state: _State, found: dict[str, Any], mended: Counter[str]) -> Iterator[str]:
    catalogue = Catalogue(root)
    if state.catalogue_lost:
        found_files = check(root, repair=True)
        mended["files listed again"] += len(found_files.files_without_row)
    else:
        looked = check(root)
        in_flight = {make(number).key for numbers in state.ingesting.values() for number in numbers}
        yield from (f"the file {name} is damaged" for name in looked.damaged_files)
        yield from (f"the row of {key} contradicts its file" for key in looked.damaged_rows)
        yield from (
            f"{name} is listed and gone" for name in looked.rows_without_file if name.partition(".")[0] not in in_flight
        )
        mended["files without a row"] += len(looked.files_without_row)
        mended["rows without a file"] += len(looked.rows_without_file)
        mended["damaged journal lines"] += looked.journal_lines
        missing = catalogue.missing(make(number).key for number in state.required)
        yield from (f"the acknowledged chunk {key} is not listed" for key in missing)
        check(root, repair=True)
    store = DiskStore(root, catalogue=catalogue)
    for number in state.required:
        try:
            same = torch.equal(store.get(make(number).key), make(number).decoded())
        except StoreError as error:
            yield f"an acknowledged chunk can't be read: {error}"
        else:
            found["compared"] += 1
            if not same:
                yield f"chunk {number} is another than was written"
    yield from _documents(catalogue, state)
    if not check(root).ok:
        yield f"check --repair did not mend all: {check(root).summary()}"
    for temporary in StoreLayout(root).chunks.rglob("*.tmp"):
        mended["half-written files"] += 1
        os.utime(temporary, (0, 0))  # its writer is dead; gc waits a minute to be sure
    gc(root)
    if list(StoreLayout(root).chunks.rglob("*.tmp")):
        yield "gc left a half-written file"
    state.required = {_number_of(key) for key, _ in catalogue.changes_since(0, _SPACE).added}
    for key, token_ids in catalogue.changes_since(0, _SPACE).added:
        if token_ids.tolist() != make(_number_of(key)).token_ids.tolist():
            yield f"the catalogue has other token ids for {key}"
    store.close()


def _documents(catalogue: Catalogue, state: _State) -> Iterator[str]:
    listed = {document.document_id for document in catalogue.documents()}
    held = {name: set(map(_number_of, keys)) for name, keys in catalogue.chunks_of(listed).items()}
    for name in listed | state.holds.keys():
        must, has = state.holds.get(name, set()), held.get(name, set())
        if name not in state.releasing and not must <= has:
            yield f"the document {name} lost its hold on {sorted(must - has)}"
        if not has <= must | state.ingesting.get(name, set()):
            yield f"the document {name} holds {sorted(has - must)}, which it let go"
    state.holds = held


def make(number: int) -> StoredChunk:
    """A chunk by its number; ``kv`` is (2, 2, 64, 2, 4) float32."""
    token_ids = np.arange(number * 1_000, number * 1_000 + _TOKENS, dtype=np.int32)
    generator = torch.Generator().manual_seed(number)
    kv = torch.randn(2, 2, _TOKENS, 2, 4, generator=generator)
    return StoredChunk(chunk_key(_SPACE, token_ids), _SPACE, token_ids, kv)


def file_bytes() -> int:
    """What a file of ``make`` takes, about."""
    return make(0).kv.nbytes + 4 * _TOKENS + 512


def _numbers(writer: int) -> range:
    return range(writer * 1_000, writer * 1_000 + _CHUNKS_A_WRITER)


_KNOWN: dict[str, int] = {}


def _number_of(key: str) -> int:
    if key not in _KNOWN:
        for writer in range(64):
            _KNOWN.update((make(number).key, number) for number in _numbers(writer))
            if key in _KNOWN:
                break
    return _KNOWN[key]


__all__ = ["file_bytes", "make", "run"]
