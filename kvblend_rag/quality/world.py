"""World: people, badge numbers and small talk that made questions are about; no model can have learnt them by heart."""

from __future__ import annotations

import random

WOMEN = ("Maria", "Elena", "Aisha", "Naomi", "Ingrid", "Leila", "Yuki", "Fatima", "Helena", "Priya", "Greta", "Rosa")
_MEN = ("James", "Robert", "Viktor", "Carlos", "Pavel", "Thomas", "Daniel", "Oscar", "Marcus", "Anton", "Samuel")
_FAMILIES = (
    *("Lopez", "Carter", "Novak", "Okafor", "Petrov", "Tanaka", "Weber", "Haddad", "Larsen", "Moreno", "Kovacs"),
    *("Silva", "Bennett", "Ricci", "Dubois", "Sato", "Fischer", "Mbeki", "Hansen", "Clarke", "Vargas", "Lindgren"),
)
CITIES = ("Lisbon", "Oslo", "Nairobi", "Kyoto", "Prague", "Toronto", "Lima", "Dublin", "Cairo", "Vienna", "Seoul")
PASTIMES = ("chess", "sailing", "pottery", "climbing", "photography", "gardening", "old maps", "jazz", "baking")
PROJECTS = (
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


class World:
    """People, their badge numbers and things to say beside them, drawn for one question."""

    def __init__(self, draw: random.Random, documents: int) -> None:
        """Args: draws all of it, and how many documents it is for."""
        self.draw, self.documents = draw, documents
        everybody = [f"{first} {family}" for first in (*WOMEN, *_MEN) for family in _FAMILIES]
        self.people = draw.sample(everybody, documents + 20)
        self.badges = [str(number) for number in draw.sample(range(1000, 9999), documents)]

    def asides(self, count: int) -> list[str]:
        """Sentences about people whom nothing is asked about."""
        return [
            self.draw.choice(_ASIDES).format(
                name=self.draw.choice(self.people[self.documents :]),
                city=self.draw.choice(CITIES),
                pastime=self.draw.choice(PASTIMES),
            )
            for _ in range(count)
        ]

    def shuffled(self, *sentences: str) -> str:
        """A text of these sentences in any order."""
        return " ".join(self.draw.sample(sentences, len(sentences)))


__all__ = ["CITIES", "PASTIMES", "PROJECTS", "WOMEN", "World"]
