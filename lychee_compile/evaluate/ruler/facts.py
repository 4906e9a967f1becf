"""Short documents on invented people, and questions that one or two of them answer."""

from __future__ import annotations

import random
from dataclasses import dataclass

from lychee_compile.evaluate.ruler.problem import Problem
from lychee_compile.evaluate.ruler.words import invented

TRADES = ("glazier", "weaver", "surveyor", "baker", "printer", "cooper", "gardener", "miller")
ANIMALS = ("goats", "pigeons", "bees", "horses", "cats", "geese")


@dataclass(frozen=True)
class _Person:
    name: str
    town: str
    teacher: str


def planted_facts(size: int, chance: random.Random, depth: float) -> Problem:
    """Return documents on `size` people, of one of whom the birthplace is asked for."""
    people = _people(chance, size + 1)
    asked = people[round(depth * size)]
    question = f"In which town was {asked.name} born?"
    return _ask(people, chance, question, f"{asked.name} was born in", asked.town, depth)


def planted_hops(size: int, chance: random.Random, depth: float) -> Problem:
    """Return documents on people, of one of whom the birthplace of the teacher is asked for."""
    people = _people(chance, size + 2)
    asked = people[round(depth * (len(people) - 1))]
    (town,) = (each.town for each in people if each.name == asked.teacher)
    question = f"In which town was the teacher of {asked.name} born?"
    return _ask(people, chance, question, f"The teacher of {asked.name} was born in", town, depth)


def _people(chance: random.Random, count: int) -> list[_Person]:
    """Return people in a random order, each the pupil of another one if there are several."""
    words = [word.capitalize() for word in invented(chance, 2 * count, syllables=4)]
    names, towns = words[:count], words[count:]
    people = [
        _Person(name, town, names[place - 1])
        for place, (name, town) in enumerate(zip(names, towns, strict=True))
    ]
    chance.shuffle(people)
    return people


def _ask(
    people: list[_Person], chance: random.Random, question: str, lead: str, town: str, depth: float
) -> Problem:
    documents = [
        f"Document {number}: {each.name} was born in {each.town} and became a "
        f"{chance.choice(TRADES)}. {each.name} learnt from {each.teacher} and kept "
        f"{chance.randrange(2, 90)} {chance.choice(ANIMALS)}."
        for number, each in enumerate(people, 1)
    ]
    return Problem(
        document="Answer the question by the given documents.\n\n" + "\n\n".join(documents),
        question=f"\n\nQuestion: {question}",
        lead=f"\nAnswer: {lead}",
        answers=(town,),
        depth=depth,
    )
