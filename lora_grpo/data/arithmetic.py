"""The built-in dataset: arithmetic word problems of one to three steps, in GSM8K's own format.

A seed goes in; rows of `question` and `answer` come out, the answer as worked steps and then `####
42`. Splits are disjoint by construction: a problem's template and numbers (not its names) decide
its split by a hash, so that no test problem is a training problem with other words, whatever the
seeds.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

SPLITS = ("train", "validation", "test")
NAMES = ("Tom", "Mia", "Ben", "Ana", "Leo", "Zoe", "Sam", "Eva")
ITEMS = ("apples", "pens", "books", "coins", "cards", "shells", "stamps", "beads")
LARGEST = 250


@dataclass(frozen=True)
class Template:
    """A problem with holes: `numbers` gives each hole's range, `steps` the solution, such as `a+b`
    (`1` is the first step's result)."""

    text: str
    numbers: dict[str, tuple[int, int]]
    steps: tuple[str, ...]


ADD, GROUPS, EACH = (3, 60), (2, 9), (2, 12)
TEMPLATES = (
    Template(
        "{name} has {a} {item} and buys {b} more. How many {item} does {name} have now?",
        {"a": ADD, "b": ADD},
        ("a+b",),
    ),
    Template(
        "{name} has {a} {item} and gives {b} of them to {other}. How many {item} are left?",
        {"a": ADD, "b": ADD},
        ("a-b",),
    ),
    Template(
        "There are {a} boxes with {b} {item} in each. How many {item} are there in all?",
        {"a": GROUPS, "b": EACH},
        ("a*b",),
    ),
    Template(
        "{name} has {a} {item}, finds {b} more and then loses {c}. How many {item} are left?",
        {"a": ADD, "b": ADD, "c": ADD},
        ("a+b", "1-c"),
    ),
    Template(
        "{name} buys {a} packs of {b} {item} and uses {c} of them. How many {item} are left?",
        {"a": GROUPS, "b": EACH, "c": ADD},
        ("a*b", "1-c"),
    ),
    Template(
        "{name} has {a} {item}. {other} has {b} more than {name}. How many {item} do they have "
        "together?",
        {"a": ADD, "b": ADD},
        ("a+b", "a+1"),
    ),
    Template(
        "{name} has {a} {item} and gets {b} more. They are shared by {c} friends. How many "
        "{item} does each get?",
        {"a": ADD, "b": ADD, "c": GROUPS},
        ("a+b", "1/c"),
    ),
    Template(
        "{name} sells {a} {item} for {b} dollars each and {c} cakes for {d} dollars each. "
        "How many dollars does {name} get?",
        {"a": GROUPS, "b": EACH, "c": GROUPS, "d": EACH},
        ("a*b", "c*d", "1+2"),
    ),
    Template(
        "{name} earns {a} dollars a day for {b} days, is given {c} dollars and spends {d} dollars. "
        "How many dollars are left?",
        {"a": EACH, "b": GROUPS, "c": ADD, "d": ADD},
        ("a*b", "1+c", "2-d"),
    ),
)


# Seen in pre-training only: it has so few numbers that held-out ones would test memory.
BAGS = Template(
    "{name} puts {a} {item} into bags of {b}. How many bags does {name} fill?",
    {"a": (4, 108), "b": GROUPS},
    ("a/b",),
)
PRETRAINING_TEMPLATES = (*TEMPLATES[:3], BAGS, *TEMPLATES[3:])


def apply(operator: str, left: int, right: int) -> int | None:
    """Return the result, or None where it is not a whole number from 1 to LARGEST."""
    if operator == "/":
        result = left // right if left % right == 0 and left // right <= EACH[1] else 0
    else:
        result = {"+": left + right, "-": left - right, "*": left * right}[operator]
    return result if 1 <= result <= LARGEST else None


def solve(template: Template, numbers: dict[str, int]) -> list[str] | None:
    """Return the solution's lines, such as `6*4=24`, or None where a step has no allowed result."""
    known, lines = dict(numbers), []
    for position, (left, operator, right) in enumerate(template.steps, start=1):
        result = apply(operator, known[left], known[right])
        if result is None:
            return None
        lines.append(f"{known[left]}{operator}{known[right]}={result}")
        known[str(position)] = result
    return lines


def split_of(template: Template, numbers: dict[str, int]) -> str:
    """Return the one split that a problem belongs to: 80 % train, 10 % validation, 10 % test."""
    key = f"{template.text}|{sorted(numbers.items())}"
    bucket = hashlib.sha256(key.encode()).digest()[0] % 10
    return {0: "test", 1: "validation"}.get(bucket, "train")


def draw_numbers(
    template: Template, split: str, draw: random.Random
) -> tuple[dict[str, int], list[str]]:
    """Draw until the numbers belong to the split and have a solution; return both."""
    while True:
        numbers = {hole: draw.randint(*limits) for hole, limits in template.numbers.items()}
        lines = solve(template, numbers)
        if lines is not None and split_of(template, numbers) == split:
            return numbers, lines


def stream_problems(
    split: str, seed: int, templates: tuple[Template, ...] = TEMPLATES
) -> Iterator[dict[str, str]]:
    """Yield problems of one split without end, each as `question` and `answer`; the same seed gives
    the same ones."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    draw = random.Random(f"{split}-{seed}")
    while True:
        template = draw.choice(templates)
        numbers, lines = draw_numbers(template, split, draw)
        name, other = draw.sample(NAMES, 2)
        words = {"name": name, "other": other, "item": draw.choice(ITEMS)}
        final = lines[-1].rsplit("=", 1)[1]
        yield {
            "question": template.text.format(**numbers, **words),
            "answer": "\n".join([*lines, f"#### {final}"]),
        }


def generate_problems(num_rows: int, split: str = "train", seed: int = 0) -> list[dict[str, str]]:
    """Return `num_rows` different problems of one split.

    Raises:
        ValueError: `split` is not one of SPLITS.
    """
    problems: dict[str, dict[str, str]] = {}
    for problem in stream_problems(split, seed):
        if len(problems) >= num_rows:
            break
        problems.setdefault(problem["question"], problem)
    return list(problems.values())
