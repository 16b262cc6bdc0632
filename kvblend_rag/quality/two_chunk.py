"""Questions made here, whose answers need two documents, and lookups of one document to compare them with.

Reuse without recomputation loses most where a fact is spread over two chunks; real sets hold few such
questions, and no answer of these can have been learnt by heart.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from kvblend_rag.quality.questions import Question

SET = "two_chunk"

_WOMEN = ("Maria", "Elena", "Aisha", "Naomi", "Ingrid", "Leila", "Yuki", "Fatima", "Helena", "Priya", "Greta", "Rosa")
_MEN = ("James", "Robert", "Viktor", "Carlos", "Pavel", "Thomas", "Daniel", "Oscar", "Marcus", "Anton", "Samuel")
_FAMILIES = (
    *("Lopez", "Carter", "Novak", "Okafor", "Petrov", "Tanaka", "Weber", "Haddad", "Larsen", "Moreno", "Kovacs"),
    *("Silva", "Bennett", "Ricci", "Dubois", "Sato", "Fischer", "Mbeki", "Hansen", "Clarke", "Vargas", "Lindgren"),
)
_CITIES = ("Lisbon", "Oslo", "Nairobi", "Kyoto", "Prague", "Toronto", "Lima", "Dublin", "Cairo", "Vienna", "Seoul")
_PASTIMES = ("chess", "sailing", "pottery", "climbing", "photography", "gardening", "old maps", "jazz", "baking")
_PROJECTS = (
    *("Falcon", "Granite", "Orchid", "Beacon", "Saffron", "Glacier", "Lantern", "Meridian"),
    *("Cobalt", "Juniper", "Tempest", "Harbor", "Cascade", "Summit", "Ember", "Willow"),
)
_ASIDES = (
    "{name} moved to {city} some years ago and works in a small office near the river.",
    "On weekends {name} enjoys {pastime} together with friends from {city}.",
    "The building in {city} was renovated and now has a library on the second floor.",
    "A short report about {pastime} was printed in the local paper of {city}.",
    "{name} once gave a talk about {pastime} that many people in {city} still remember.",
    "Trains to {city} leave every hour and the journey is said to be pleasant.",
    "The annual meeting about {pastime} takes place in {city} in early spring.",
)


class _World:
    """People, their badge numbers and things to say beside them, drawn for one question."""

    def __init__(self, draw: random.Random, documents: int) -> None:
        self.draw, self.documents = draw, documents
        everybody = [f"{first} {family}" for first in (*_WOMEN, *_MEN) for family in _FAMILIES]
        self.people = draw.sample(everybody, documents + 20)
        self.badges = [str(number) for number in draw.sample(range(1000, 9999), documents)]

    def asides(self, count: int) -> list[str]:
        return [
            self.draw.choice(_ASIDES).format(
                name=self.draw.choice(self.people[self.documents :]),
                city=self.draw.choice(_CITIES),
                pastime=self.draw.choice(_PASTIMES),
            )
            for _ in range(count)
        ]

    def shuffled(self, *sentences: str) -> str:
        return " ".join(self.draw.sample(sentences, len(sentences)))


_Asked = tuple[str, str, list[str], tuple[int, ...]]


def _lookup(world: _World) -> _Asked:
    """The fact stands in one document."""
    documents = [
        world.shuffled(*world.asides(6), f"The badge number of {world.people[place]} is {world.badges[place]}.")
        for place in range(world.documents)
    ]
    asked = world.draw.randrange(world.documents)
    return f"What is the badge number of {world.people[asked]}?", world.badges[asked], documents, (asked,)


def _two_hops(world: _World) -> _Asked:
    """One document names a project's leader, another the leader's number."""
    projects = world.draw.sample(_PROJECTS, world.documents)
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


def _pronoun(world: _World) -> _Asked:
    """One document says who it is about, the next says only she or he."""
    documents = []
    for place in range(world.documents // 2):
        person = world.people[place]
        they, their = ("She", "Her") if person.split()[0] in _WOMEN else ("He", "His")
        years = world.draw.randrange(3, 20)
        about = [f"This profile is about {person}.", f"{person} has been with the company for {years} years."]
        documents.append(" ".join([*world.asides(5), *about]))
        grew_up = f"{they} grew up in {world.draw.choice(_CITIES)} and likes {world.draw.choice(_PASTIMES)}."
        documents.append(" ".join([grew_up, f"{their} badge number is {world.badges[place]}.", *world.asides(4)]))
    asked = world.draw.randrange(world.documents // 2)
    evidence = (2 * asked, 2 * asked + 1)
    return f"What is the badge number of {world.people[asked]}?", world.badges[asked], documents, evidence


_KINDS: dict[str, Callable[[_World], _Asked]] = {"lookup": _lookup, "two_hops": _two_hops, "pronoun": _pronoun}


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
        world = _World(random.Random(f"{seed}-{number}"), documents)
        text, answer, texts, supporting = _KINDS[kind](world)
        questions.append(Question.made(SET, f"{seed}-{number}", kind, text, answer, texts, supporting))
    return questions


__all__ = ["SET", "two_chunk_questions"]
