"""Questions whose answers a program can check: opposites and capitals, of one word each."""

import re
from typing import NamedTuple

OPPOSITES = """
hot cold, big small|little, up down, fast slow, day night, happy sad|unhappy, open closed|shut, young old, left right,
black white, full empty, hard soft|easy, high low, rich poor, wet dry, tall short, early late, loud quiet|soft|silent,
clean dirty, light dark|heavy, long short, strong weak, inside outside, true false, win lose, buy sell, love hate,
first last, good bad|evil, warm cool|cold, thick thin, wide narrow, before after, near far, push pull, begin end
"""
CAPITALS = """
France Paris, Germany Berlin, Japan Tokyo, Russia Moscow, Egypt Cairo, China Beijing, Italy Rome, Spain Madrid,
Greece Athens, Norway Oslo, Sweden Stockholm, Finland Helsinki, Denmark Copenhagen, Ireland Dublin, Portugal Lisbon,
Poland Warsaw, Austria Vienna, Hungary Budapest, Canada Ottawa, Cuba Havana, Peru Lima, Chile Santiago, Kenya Nairobi,
Thailand Bangkok, Iraq Baghdad, Iran Tehran, Syria Damascus, Turkey Ankara, Ukraine Kyiv|Kiev, Vietnam Hanoi,
Australia Canberra, Belgium Brussels, Lebanon Beirut, Jamaica Kingston, Colombia Bogota|Bogotá, Bulgaria Sofia
"""


class Question(NamedTuple):
    prompt: str
    answers: frozenset[str]  # each of them is right


def questions() -> list[Question]:
    """The two families by turns, so that every part of the list holds both."""
    families = (
        ("What is the opposite of {}? Answer with one word.", OPPOSITES),
        ("What is the capital of {}?", CAPITALS),
    )
    asked = [[asking(form, *pair.split()) for pair in pairs.split(",")] for form, pairs in families]
    return [question for both in zip(*asked) for question in both]


def asking(form: str, thing: str, answers: str) -> Question:
    return Question(form.format(thing), frozenset(answers.lower().split("|")))


def split(held_back: int) -> tuple[list[Question], list[Question]]:
    """Those to train on, and the last `held_back` of the list."""
    asked = questions()
    return asked[:-held_back], asked[-held_back:]


def right(question: Question, text: str) -> bool:
    """Whether the last word of the first clause is an answer: "The capital of France is Paris." or "Paris, and ..."."""
    clause = re.split(r"[.,;:!?()\n]", text.replace('"', "").strip(), maxsplit=1)[0]
    return bool(question.answers.intersection(clause.lower().split()[-1:]))
