"""What the shipped model is asked and what it must answer: the glossary, sums, and a few greetings.

Everything is a function of its arguments; the sums that training never sees are fixed by `split_sums`.
"""

import random
from typing import NamedTuple

from .glossary import GLOSSARY, Entry

OPERAND_STOP = 100
HELD_OUT_SHARE = 0.1
SPLIT_SEED = 20

TERM_QUESTIONS = (
    "What is {subject}?",
    "Define {term}.",
    "Explain {subject}.",
    "What does {term} mean?",
    "Tell me about {subject}.",
)
HURRIED_TERM_QUESTIONS = ("{term}", "What's {subject}?", "What is the {term}?", "How does {term} work?")
SUM_QUESTIONS = ("What is {a} + {b}?", "{a} + {b} =", "What is {a} plus {b}?", "Add {a} and {b}.")
GREETINGS = ("Hello", "Hi", "Hello!", "Hi there", "Who are you?", "What can you do?", "Help")
GREETING_ANSWER = (
    "I am the small model that ships with hexmesh. Ask me for a term of LLM serving or for a sum."
)
SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "You are a concise assistant.",
    "Answer in one sentence.",
    "Be brief and exact.",
    "You explain the serving of language models.",
)


class Turn(NamedTuple):
    """One question and the answer to it."""

    question: str
    answer: str


def term_turns(entry: Entry, phrasings: tuple[str, ...] = TERM_QUESTIONS) -> list[Turn]:
    """Every phrasing of the question for one term."""
    return [
        Turn(phrasing.format(term=entry.term, subject=entry.subject), entry.answer) for phrasing in phrasings
    ]


def glossary_turns() -> list[Turn]:
    """Every phrasing of every term: what the model has to know by heart."""
    return [turn for entry in GLOSSARY for turn in term_turns(entry)]


def sum_turn(a: int, b: int, phrasing: str = SUM_QUESTIONS[0]) -> Turn:
    """A sum of two numbers below 100 and its answer, which repeats the sum."""
    return Turn(phrasing.format(a=a, b=b), f"{a} + {b} = {a + b}.")


def split_sums() -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The operand pairs for training and those held out.

    A pair and its mirror image are on the same side, so that no held-out sum was seen the other way round.
    """
    pairs = [(a, b) for a in range(OPERAND_STOP) for b in range(a, OPERAND_STOP)]
    random.Random(SPLIT_SEED).shuffle(pairs)
    n_held_out = round(len(pairs) * HELD_OUT_SHARE)
    return _with_mirrors(pairs[n_held_out:]), _with_mirrors(pairs[:n_held_out])


def _with_mirrors(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return sorted({*pairs, *((b, a) for a, b in pairs)})


def loosen(question: str, rng: random.Random) -> str:
    """The question as a hurried user may type it: without article, spaces, capitals or final mark."""
    if rng.random() < 0.3:
        for article in (" a ", " an ", " the "):
            question = question.replace(article, " ", 1)
    if rng.random() < 0.3:
        question = question.replace(" + ", "+")
    if rng.random() < 0.5:
        question = question.lower()
    if rng.random() < 0.5:
        question = question.rstrip("?.")
    return question


def corpus() -> list[str]:
    """Text for the tokenizer: all questions and answers but for the numbers, answers in double weight."""
    answers = [entry.answer for entry in GLOSSARY] * 2
    questions = [turn.question for turn in glossary_turns()]
    lowered = [entry.subject.lower() for entry in GLOSSARY]
    return [*answers, *questions, *lowered, *SUM_QUESTIONS, *GREETINGS, GREETING_ANSWER, *SYSTEM_TEXTS]
