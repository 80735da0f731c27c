"""A task: what the model is asked for, how its answer is read, and when that answer is right.

The prompt, the rewards, the evaluation, the model card and the chat ask one `Task`, so that what is
paid in training is what is measured and shown. Reading takes time linear in the length of the
completion: tags are counted and cut out as plain strings.
"""

from collections.abc import Callable
from dataclasses import dataclass

from lora_grpo.data.numbers import last_number, parse_number, same_number

Tags = tuple[str, str]


@dataclass(frozen=True)
class Task:
    """One reasoning block and one answer block, each between its tags.

    `same` compares an answer with the gold answer; `can_read` returns whether it can compare a text
    at all; `find_last` returns the last answer in a text without tags, for lenient accuracy.
    """

    same: Callable[[str, str], bool]
    can_read: Callable[[str], bool]
    find_last: Callable[[str], str | None]
    reasoning: Tags = ("<reasoning>", "</reasoning>")
    answer: Tags = ("<answer>", "</answer>")

    @property
    def tags(self) -> tuple[str, ...]:
        """The four tags in the order of a completion."""
        return (*self.reasoning, *self.answer)

    @property
    def system_prompt(self) -> str:
        """The built-in system prompt: the layout of a completion."""
        return "Respond in the following format:\n" + self.write("...", "...")

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

    def is_right(self, completion: str, gold: str) -> bool:
        """Return whether the text between the answer tags equals the gold answer."""
        answer = self.parse(completion)
        return answer is not None and self.same(answer, gold)

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
    same=same_number,
    can_read=lambda text: parse_number(text) is not None,
    find_last=last_number,
)
