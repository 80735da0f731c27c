"""Answers by which a task could be fooled, or too strict: ways to write a right answer, and wrong
ones that look like it, made for one problem.

For a choice: a letter in a sentence, two letters, an option's text; for texts and formulas: hedges,
sentences, lists.
"""

from collections.abc import Callable
from dataclasses import dataclass

from lora_grpo.data.problems import Problem
from lora_grpo.tasks.choice import LETTERS, find_options, list_options, read_choice
from lora_grpo.tasks.numbers import parse_number
from lora_grpo.tasks.task import Task
from lora_grpo.tasks.text import normalise, split_golds

Answers = dict[str, str]


@dataclass(frozen=True)
class Tricks:
    """Answers to one problem by the name of the trick; `other` is a plainly wrong one."""

    right: Answers
    wrong: Answers
    other: str


def of_choice(problem: Problem) -> Tricks:
    """Return answers to a multiple choice."""
    options = find_options(problem.question)
    letter = problem.answer
    others = [one for one in options or LETTERS[:4] if one != letter]
    other, text = others[0], options.get(letter, "")
    right = {
        "the letter": letter,
        "small letter": letter.lower(),
        "letter in brackets": f"({letter})",
        "letter in bold": f"**{letter}**",
        "letter in a box": rf"\boxed{{{letter}}}",
    }
    wrong = {
        "another letter": other,
        "two letters, or": f"{letter} or {other}",
        "two letters, and": f"{letter} and {other}",
        "two letters": f"{letter}{other}",
        "letter in a sentence": f"I think it is {letter}, because nothing else fits",
        "letter, then doubt": f"{letter}, but it could be {other}",
        "all letters": ", ".join(options or LETTERS[:4]),
    }
    if read_choice(text, options) == letter:
        right |= {"the option's text": text, "letter and text": f"{letter}. {text}"}
        wrong["letter with another's text"] = f"{letter}. {options[other]}"
        wrong["another's text"] = options[other]
    if options:
        wrong["a letter that is no option"] = LETTERS[len(options)]
    return Tricks(right, wrong, other)


def of_text(problem: Problem) -> Tricks:
    """Return answers where a text is asked for."""
    golds = split_golds(problem.answer)
    gold = golds[0]
    right = {
        **{f"gold answer {number}": one for number, one in enumerate(golds, start=1)},
        "capital letters": gold.upper(),
        "full stop": f"{gold}.",
        "quotes": f'"{gold}"',
    }
    wrong = {
        "its negation": f"not {gold}",
        "two texts, or": f"{gold} or something else",
        "text in a sentence": f"I believe that it is {gold}",
        "last character lost": normalise(gold)[:-1],
        "said twice": f"{gold} {gold}",
        "gold answers as a list": str([gold, "something else"]),
    }
    return Tricks(right, wrong, "something else")


def of_math(problem: Problem) -> Tricks:
    """Return answers where a formula is asked for."""
    gold = problem.answer
    right = {
        "the formula": gold,
        "in dollars": f"${gold}$",
        "in a box": rf"\boxed{{{gold}}}",
        "in brackets": rf"\({gold}\)",
    }
    wrong = {
        "one more": f"{gold} + 1",
        "two formulas, or": f"{gold} or {gold} + 1",
        "two formulas, listed": f"{gold}, {gold} + 1",
        "two boxes": rf"\boxed{{{gold}}} \boxed{{{gold} + 1}}",
        "formula in a sentence": f"I think that it is {gold}, as nothing else fits",
        "a tower of powers": "9^{9^{9^{9^9}}}",
        "broken LaTeX": rf"\frac{{{gold}",
    }
    if parse_number(gold) is not None:
        wrong["work that is left to do"] = f"{gold} + 0"
    return Tricks(right, wrong, f"{gold} + 1")


def of_any(problem: Problem) -> Tricks:
    """Return answers for a task of which only the gold answer is known."""
    return Tricks({"the gold answer": problem.answer}, {"a question mark": "?"}, "?")


TRICKS: dict[str, Callable[[Problem], Tricks]] = {
    "choice": of_choice,
    "text": of_text,
    "math": of_math,
}
ASKED = "How many is that?\n" + list_options(["71", "72", "73", "none of these"])
SAMPLES = {
    "choice": Problem(1, ASKED, "B"),
    "text": Problem(1, "Which city has the Eiffel Tower?", '["Paris", "City of Paris"]'),
    "math": Problem(1, "What is the half of a third?", r"\frac{1}{6}"),
}


def make_tricks(task: Task, problem: Problem | None) -> tuple[Problem, Tricks]:
    """Return a problem with tricky answers to it: the one given, or a made-up one of the task."""
    chosen = problem or SAMPLES.get(task.name) or Problem(1, "How many?", "72")
    return chosen, TRICKS.get(task.name, of_any)(chosen)
