"""Questions made here that need every document, and lookups of one of the same documents to compare them with."""

from __future__ import annotations

import random

from kvblend_rag.quality.questions import Question
from kvblend_rag.quality.world import PROJECTS, World

SET = "aggregate"
AGGREGATE, LOOKUP = "aggregate", "lookup"


def aggregate_questions(count: int, *, documents: int = 10, seed: int = 0) -> list[Question]:
    """Pairs over the same documents: how many of them mention a project or who works on it, and one badge number.

    Args:
        count: how many; an aggregation, its lookup, the next aggregation, ….
        documents: of about 100 tokens each, 2 to 16.
        seed: the same one gives the same questions.
    """
    return [_question(seed, number, documents) for number in range(count)]


def _question(seed: int, number: int, documents: int) -> Question:
    pair = number // 2
    world = World(random.Random(f"{seed}-{pair}"), documents)
    asked, *others = world.draw.sample(PROJECTS, documents)
    there = sorted(world.draw.sample(range(documents), world.draw.randrange(1, documents)))
    projects = [asked if place in there else world.draw.choice(others) for place in range(documents)]
    texts = [
        world.shuffled(
            *world.asides(5),
            f"{world.people[place]} works on the {projects[place]} project.",
            f"The badge number of {world.people[place]} is {world.badges[place]}.",
        )
        for place in range(documents)
    ]
    one = world.draw.randrange(documents)
    if number % 2:
        text, answer, evidence = f"What is the badge number of {world.people[one]}?", world.badges[one], [one]
        return Question.made(SET, f"{seed}-{number}", LOOKUP, text, answer, texts, evidence)
    if pair % 2:
        text, answer = f"List all people who work on the {asked} project.", ", ".join(world.people[at] for at in there)
    else:
        text, answer = f"How many of the documents mention the {asked} project?", str(len(there))
    return Question.made(SET, f"{seed}-{number}", AGGREGATE, text, answer, texts, there)


__all__ = ["AGGREGATE", "LOOKUP", "SET", "aggregate_questions"]
