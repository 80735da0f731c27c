"""A task: what the model is asked for, how its answer is read, and when that answer is right.

The prompt, the rewards, the evaluation, the model card and the chat ask one `Task`, so that what is
paid in training is what is measured and shown. Reading takes time linear in the length of the
completion: tags are counted and cut out as plain strings.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from lora_grpo.tasks.numbers import last_number, parse_number, same_number

Tags = tuple[str, str]
# What a dataset's row holds, by column, with `question` and `answer` as they were read.
Row = Mapping[str, Any]
NO_ROW: Row = MappingProxyType({})


@dataclass(frozen=True)
class Verdict:
    """A completion as its task sees it: the answer that it gives, if any, whether that is right,
    and whether the completion has the requested format."""

    answer: str | None
    correct: bool
    format: bool


@dataclass(frozen=True)
class Task:
    """One reasoning block and one answer block, each between its tags, and what is right there.

    `compare` returns whether an answer equals the gold answer, and may ask the problem's row;
    `can_read` returns whether a gold answer can be compared at all; `find_last` returns the last
    answer in a text without tags, for lenient accuracy; `write_gold` returns a gold answer as a
    model would write it; `check` raises a ValueError where the task cannot judge on this machine.
    `noun` says what an answer is. A task that asks more of the row than its question sets
    `needs_row`: the row is then recorded with the evaluated problems.
    """

    name: str
    noun: str
    compare: Callable[[str, str, Row], bool]
    can_read: Callable[[str], bool]
    find_last: Callable[[str], str | None]
    instruction: str = ""
    needs_row: bool = False
    write_gold: Callable[[str], str] = str
    check: Callable[[], None] = lambda: None
    reasoning: Tags = ("<reasoning>", "</reasoning>")
    answer: Tags = ("<answer>", "</answer>")

    @property
    def sha256(self) -> str | None:
        """The hash of the file that the task comes from, None for a built-in one."""
        return None

    @property
    def reads_tags(self) -> bool:
        """Whether an answer is what stands between the answer tags, so that a gold answer there is
        right."""
        return True

    @property
    def tags(self) -> tuple[str, ...]:
        """The four tags in the order of a completion."""
        return (*self.reasoning, *self.answer)

    @property
    def system_prompt(self) -> str:
        """The built-in system prompt: the layout of a completion, and what an answer looks like."""
        layout = "Respond in the following format:\n" + self.write("...", "...")
        return f"{layout}\n{self.instruction}" if self.instruction else layout

    def write(self, reasoning: str, answer: str) -> str:
        """Return a completion in the layout that the system prompt shows."""
        opening, closing = self.reasoning
        return "\n".join([opening, reasoning, closing, self.write_answer(answer)])

    def write_answer(self, answer: str) -> str:
        """Return the answer block of a completion."""
        return "\n".join([self.answer[0], answer, self.answer[1]])

    def parse(self, completion: str) -> str | None:
        """Return the stripped text between the answer tags, or None unless there is exactly one of
        each, in order: two answers are no hedge."""
        return between(completion, *self.answer)

    def parse_reasoning(self, completion: str) -> str | None:
        """Return the stripped text between the reasoning tags, or None, as `parse` does."""
        return between(completion, *self.reasoning)

    def same(self, answer: str, gold: str, row: Row = NO_ROW) -> bool:
        """Return whether an answer equals the gold answer of a row."""
        return self.compare(answer, gold, row)

    def score(self, completion: str, gold: str, row: Row = NO_ROW) -> float:
        """Return what the reward `correctness` pays, 1 for a right answer."""
        return float(self.is_right(completion, gold, row))

    def is_right(self, completion: str, gold: str, row: Row = NO_ROW) -> bool:
        """Return whether the text between the answer tags equals the gold answer."""
        answer = self.parse(completion)
        return answer is not None and self.same(answer, gold, row)

    def is_right_anywhere(self, completion: str, gold: str, row: Row = NO_ROW) -> bool:
        """Return whether the last answer anywhere, with tags or without, equals the gold answer."""
        last = self.find_last(completion)
        return last is not None and self.same(last, gold, row)

    def judge(self, completion: str, gold: str, row: Row = NO_ROW) -> Verdict:
        """Return the answer that a completion gives, and whether it and its format are right."""
        right = self.is_right(completion, gold, row)
        return Verdict(self.parse(completion), right, self.has_format(completion))

    def has_format(self, completion: str) -> bool:
        """Return whether the completion is one reasoning block and one answer block, neither blank.

        White space around the blocks is free; any other text there, or a tag too many, is not.
        """
        if any(completion.count(tag) != 1 for tag in self.tags):
            return False
        pieces, rest = [], completion
        for tag in self.tags:
            piece, found, rest = rest.partition(tag)
            if not found:
                return False
            pieces.append(piece.strip())
        before, reasoning, middle, answer = pieces
        return bool(reasoning and answer) and not (before or middle or rest.strip())


def between(text: str, opening: str, closing: str) -> str | None:
    """Return the stripped text between two tags, or None unless each is there once, in order."""
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    inside, closed, _ = text.partition(opening)[2].partition(closing)
    return inside.strip() if closed else None


NUMBER_TASK = Task(
    name="number",
    noun="number",
    compare=lambda answer, gold, row: same_number(answer, gold),
    can_read=lambda text: parse_number(text) is not None,
    find_last=last_number,
)
