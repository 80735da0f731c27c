"""Procedural problems of the `reasoning-gym` package, and its own scorers as the task.

`reasoning-gym:chain_sum:max_terms=2,spell_backward` goes in, generators with their settings come
out. A problem is named by its generator, a seed and an index, from which it is made again wherever
it is scored.
"""

import dataclasses
import difflib
import functools
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import yaml

from lora_grpo.tasks.numbers import last_number
from lora_grpo.tasks.task import NO_ROW, Row, Task

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

PREFIX = "reasoning-gym:"
PACKAGE = "reasoning-gym"
GALLERY = "https://github.com/open-thought/reasoning-gym/blob/main/GALLERY.md"
# What the package raises, of settings that it refuses and of answers that its scorers cannot read.
ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)
# Problems per instance of the package's dataset, whose seed and size decide what it holds.
BLOCK = 1000
SEEDS = 1000
# Commas and colons inside of brackets belong to a value.
COMMA, COLON = re.compile(r",(?![^\[]*\])"), re.compile(r":(?![^\[]*\])")
UNREPEATABLE = "its problems differ from one process to the next (it draws from Python sets)"
EVALUATES = "its scorer runs the model's text as Python code"
REFUSED = {
    **dict.fromkeys(("codeio", "isomorphic_strings", "knight_swap"), UNREPEATABLE),
    **dict.fromkeys(("list_functions", "ransom_note", "word_ladder"), UNREPEATABLE),
    **dict.fromkeys(("simple_integration", "intermediate_integration"), EVALUATES),
    "polynomial_multiplication": EVALUATES,
    "composite": "it only joins others: give their names, separated by commas",
}
# Scorers that evaluate an answer, but pay nothing in full that the expression below holds: a call,
# a power, a large exponent, or what is neither a word nor arithmetic.
GUARDED = {"countdown", "puzzle24", "coin_flip", "n_queens"}
GUARDED |= {"binary_matrix", "spiral_matrix", "string_insertion"}
UNSAFE = re.compile(r"[^\w\s+*/().-]|[\w)]\s*\(|\*\s*\*|[0-9]e[+-]?[0-9]{3}", re.IGNORECASE)
# What no question asks for; a scorer that pays it would teach just that.
NONSENSE = ("nan", "?")


@dataclass(frozen=True)
class Generator:
    """A generator with its settings, as written in `--dataset`.

    `size` and `test_size` are the numbers of training and test problems, `seed` chooses the
    training problems; the other settings are the package's own.
    """

    name: str
    text: str
    settings: dict[str, Any]
    size: int = 2000
    test_size: int = 256
    seed: int = 0


# The columns that say where a problem comes from.
PLACE = {"generator", "seed", "index"}
SAID = re.compile(r":\s+|\bis\s+", re.IGNORECASE)
OURS = ("size", "test_size", "seed")


def load_package() -> dict[str, tuple[type, type]]:
    """Return the package's generators: a name's dataset class and its settings' class.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError(
            f"needs the package {PACKAGE} ({error}): pip install {PACKAGE}; its pycosat needs a C "
            "compiler"
        ) from None
    return DATASETS


def read_generators(dataset: str) -> list[Generator]:
    """Return the generators that a dataset's name lists.

    Raises:
        ValueError: the package is missing, or a name or a setting is unknown, with near ones.
    """
    known = load_package()
    texts = [text.strip() for text in COMMA.split(dataset.removeprefix(PREFIX))]
    generators = [read_generator(text, known) for text in texts]
    twice = [text for text in texts if texts.count(text) > 1]
    if twice:
        raise ValueError(f"names {twice[0]} twice: give it once, with a larger size")
    return generators


def read_generator(text: str, known: dict[str, tuple[type, type]]) -> Generator:
    """Return the generator of `name:setting=value:...`."""
    name, *pairs = COLON.split(text)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"perhaps you meant {' or '.join(near)}" if near else f"see {GALLERY}"
        raise ValueError(f"names no generator of {PACKAGE}, got {name!r}: {hint}")
    if name in REFUSED:
        raise ValueError(f"cannot be trained on {name}, since {REFUSED[name]}: choose another")
    defaults = default_settings(known[name][1])
    values = dict(read_setting(name, pair, defaults) for pair in pairs)
    ours = {key: values.pop(key) for key in OURS if key in values}
    generator = Generator(name, text, values, **ours)
    limits = {"size": (1, 10**6), "test_size": (1, 10**5), "seed": (0, SEEDS - 1)}
    for key, (lowest, highest) in limits.items():
        if not lowest <= getattr(generator, key) <= highest:
            raise ValueError(
                f"{name}: {key} must be from {lowest} to {highest:,}, got {getattr(generator, key)}"
            )
    return generator


def default_settings(kind: type) -> dict[str, Any]:
    """Return a generator's settings with their defaults, and ours, which go by the same syntax."""
    found = {}
    for field in dataclasses.fields(kind):
        has_factory = field.default_factory is not dataclasses.MISSING
        default = field.default_factory() if has_factory else field.default
        is_list = default is None and "list" in str(field.type).lower()
        found[field.name] = [] if is_list else default
    return found | {key: getattr(Generator, key) for key in OURS}


def read_setting(name: str, pair: str, fields: dict[str, Any]) -> tuple[str, Any]:
    """Return a setting and its value, of the kind of its default."""
    key, found, written = pair.partition("=")
    if not found or key not in fields:
        near = difflib.get_close_matches(key, fields, n=1)
        hint = f"perhaps you meant {near[0]}; " if near and found else ""
        allowed = ", ".join(f"{key}={value!r:.40}" for key, value in fields.items())
        raise ValueError(
            f"{name}: {pair!r} is no setting=value of this generator: {hint}allowed are, with "
            f"their defaults, {allowed}"
        )
    try:
        value = yaml.safe_load(written)
    except yaml.YAMLError:
        value = written
    return key, to_kind(f"{name}: {key}", value, fields[key])


def to_kind(setting: str, value: Any, default: Any) -> Any:
    """Return a value as the kind of the setting's default: several are a list, an enumeration's
    are its members.

    Raises:
        ValueError: it is of another kind.
    """
    if isinstance(default, list | tuple):
        values = value if isinstance(value, list) else [value]
        return [to_kind(setting, item, default[0]) if default else item for item in values]
    allowed = f"of the kind of its default, {default!r}"
    if isinstance(default, Enum):
        members = {member.value: member for member in type(default)}
        if value in members:
            return members[value]
        allowed = f"one of {', '.join(map(str, members))}"
    else:
        kinds = {bool: bool, int: int, float: int | float, str: str}
        kind = kinds.get(type(default), object)
        if isinstance(value, kind) and (
            default is None or isinstance(value, bool) == (kind is bool)
        ):
            return value
    raise ValueError(f"{setting} must be {allowed}, got {value!r}")


@contextmanager
def explaining(generator: str) -> Iterator[None]:
    """Turn an error of the package, which has no error type of its own, into one sentence."""
    try:
        yield
    except ERRORS as error:
        raise ValueError(
            f"{generator}: {PACKAGE} refuses these settings ({error or type(error).__name__}): "
            "change them"
        ) from error


@functools.lru_cache(maxsize=64)
def open_block(text: str, seed: int) -> "ProceduralDataset":
    """Return the package's dataset of one block of problems.

    Raises:
        ValueError: the package refuses the settings.
    """
    known = load_package()
    generator = read_generator(text, known)
    kind, settings = known[generator.name]
    with explaining(generator.name):
        return kind(settings(**generator.settings, seed=seed, size=BLOCK))


@functools.lru_cache(maxsize=2**14)
def make_entry(text: str, seed: int, index: int) -> dict[str, Any]:
    """Return the package's entry of one problem: `question`, `answer` and `metadata`."""
    block = open_block(text, seed)
    with explaining(COLON.split(text)[0]):
        return block[index]


def score(answer: str, row: Row) -> float:
    """Return what the scorer of a row's generator pays for an answer, from 0 to 1.

    An answer on which the scorer raises an error is one that it cannot read, and pays 0.
    """
    place = (row["generator"], row["seed"], row["index"])
    if COLON.split(place[0])[0] in GUARDED and UNSAFE.search(answer):
        return 0.0
    dataset, entry = open_block(*place[:2]), make_entry(*place)
    try:
        return float(dataset.score_answer(answer, entry))
    except ERRORS:
        return 0.0


def is_right(answer: str, row: Row) -> bool:
    """Return whether the scorer pays an answer in full."""
    return score(answer, row) >= 1


def compare(answer: str, other: str, row: Row) -> bool:
    """Return whether two answers are the same text, or both right: many puzzles have several."""
    return answer == other or (
        row.keys() >= PLACE and is_right(answer, row) and is_right(other, row)
    )


class ScoredTask(Task):
    """The task of a dataset that brings its own scorer, which alone knows what an answer is."""

    def is_right_anywhere(self, completion: str, gold: str, row: Row = NO_ROW) -> bool:
        """Return whether any of the last things that a completion says is right."""
        return any(self.same(text, gold, row) for text in last_texts(completion, self))


def last_texts(completion: str, task: Task) -> list[str]:
    """Return what may be meant as the answer: the text between the tags, the last line, what
    follows the last colon or `is` there, the last number."""
    line = (completion.strip().splitlines() or [""])[-1].strip().rstrip(".")
    found = [task.parse(completion), line, SAID.split(line)[-1], last_number(completion)]
    return [text for text in found if text]


REASONING_GYM = ScoredTask(
    name="reasoning-gym",
    noun="answer",
    compare=compare,
    can_read=lambda text: True,
    find_last=last_number,
    needs_row=True,
)
