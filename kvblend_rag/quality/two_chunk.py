"""Questions made here, whose answers need two documents, and lookups of one document to compare them with.

Reuse without recomputation loses most where a fact is spread over two chunks; real sets hold few such
questions, and no answer of these can have been learnt by heart.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from kvblend_rag.quality.questions import Question
from kvblend_rag.quality.world import CITIES, PASTIMES, PROJECTS, WOMEN, World

SET = "two_chunk"

_Asked = tuple[str, str, list[str], tuple[int, ...]]


def _lookup(world: World) -> _Asked:
    """The fact stands in one document."""
    documents = [
        world.shuffled(*world.asides(6), f"The badge number of {world.people[place]} is {world.badges[place]}.")
        for place in range(world.documents)
    ]
    asked = world.draw.randrange(world.documents)
    return f"What is the badge number of {world.people[asked]}?", world.badges[asked], documents, (asked,)


def _two_hops(world: World) -> _Asked:
    """One document names a project's leader, another the leader's number."""
    projects = world.draw.sample(PROJECTS, world.documents)
    holder = world.draw.sample(range(world.documents), world.documents)
    documents = [
        world.shuffled(
            *world.asides(5),
            f"The {projects[place]} project is led by {world.people[place]}.",
            f"The badge number of {world.people[holder[place]]} is {world.badges[holder[place]]}.",
        )
        for place in range(world.documents)
    ]
    asked = world.draw.choice([place for place in range(world.documents) if holder[place] != place] or [0])
    question = f"What is the badge number of the person who leads the {projects[asked]} project?"
    return question, world.badges[asked], documents, (asked, holder.index(asked))


def _pronoun(world: World) -> _Asked:
    """One document says who it is about, the next says only she or he."""
    documents = []
    for place in range(world.documents // 2):
        person = world.people[place]
        they, their = ("She", "Her") if person.split()[0] in WOMEN else ("He", "His")
        years = world.draw.randrange(3, 20)
        about = [f"This profile is about {person}.", f"{person} has been with the company for {years} years."]
        documents.append(" ".join([*world.asides(5), *about]))
        grew_up = f"{they} grew up in {world.draw.choice(CITIES)} and likes {world.draw.choice(PASTIMES)}."
        documents.append(" ".join([grew_up, f"{their} badge number is {world.badges[place]}.", *world.asides(4)]))
    asked = world.draw.randrange(world.documents // 2)
    evidence = (2 * asked, 2 * asked + 1)
    return f"What is the badge number of {world.people[asked]}?", world.badges[asked], documents, evidence


_KINDS: dict[str, Callable[[World], _Asked]] = {"lookup": _lookup, "two_hops": _two_hops, "pronoun": _pronoun}


def two_chunk_questions(count: int, *, documents: int = 10, seed: int = 0) -> list[Question]:
    """Questions of three kinds in turn: ``lookup`` (one document), ``two_hops`` and ``pronoun`` (two).

    Args:
        count: how many.
        documents: of about 100 tokens each, 2 to 16.
        seed: the same one gives the same questions.
    """
    questions = []
    for number in range(count):
        kind = list(_KINDS)[number % len(_KINDS)]
        world = World(random.Random(f"{seed}-{number}"), documents)
        text, answer, texts, supporting = _KINDS[kind](world)
        questions.append(Question.made(SET, f"{seed}-{number}", kind, text, answer, texts, supporting))
    return questions


__all__ = ["SET", "two_chunk_questions"]
