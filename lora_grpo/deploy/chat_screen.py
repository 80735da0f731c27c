"""What a person sees of a chat: reasoning dim, the answer prominent, both as they are written; base
and adapter in two columns."""

import re
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lora_grpo.machine.terminal import printable
from lora_grpo.policy.generate import Completion
from lora_grpo.tasks.task import Task

if TYPE_CHECKING:
    from lora_grpo.deploy.chat_model import ChatModel

STYLES = {"text": "", "reasoning": "dim", "answer": "bold green"}
REASONING, REASONING_END, ANSWER, ANSWER_END = map(re.escape, (*Task.reasoning, *Task.answer))
# An answer counts even where the reasoning was never closed, as it does for the parser that pays.
BLOCK = re.compile(
    rf"{REASONING}(?P<reasoning>.*?)(?:{REASONING_END}|(?={ANSWER})|\Z)"
    rf"|{ANSWER}(?P<answer>.*?)(?:{ANSWER_END}|\Z)",
    re.DOTALL,
)
MAY_BECOME_TAG = re.compile(r"<[^<>\s]*\Z")
REFRESHES = 12  # per second


def split_parts(completion: str) -> list[tuple[str, str]]:
    """Return the reasoning, the answer and the text around them, in their order and stripped."""
    parts, end = [], 0
    for block in BLOCK.finditer(completion):
        kind = block.lastgroup
        parts += [("text", completion[end : block.start()]), (kind, block[kind])]
        end = block.end()
    parts.append(("text", completion[end:]))
    return [(kind, text.strip()) for kind, text in parts if text.strip()]


def paint(completion: str, finished: bool = True) -> Text:
    """Return a completion with headings in place of its tags.

    What an unfinished one shows is the beginning of what it shows later.
    """
    painted = Text()
    for kind, text in split_parts(completion if finished else MAY_BECOME_TAG.sub("", completion)):
        if painted:
            painted.append("\n")
        if kind != "text":
            painted.append(kind, "underline").append("\n")
        # A model's escape codes are not for the terminal to obey.
        painted.append(printable(text), STYLES[kind])
    return painted


def note(console: Console, text: str) -> None:
    """Print a line that is not the model's."""
    console.print(text, style="dim", markup=False, soft_wrap=True)


def show(console: Console, model: "ChatModel", question: str) -> None:
    """Ask the model and print its completions as they are written."""
    (show_alone if len(model.sides) == 1 else show_side_by_side)(console, model, question)


def show_alone(console: Console, model: "ChatModel", question: str) -> None:
    """Print one completion."""
    said, shown = "", 0

    def hear(side: str, chunk: str, finished: bool = False) -> None:
        nonlocal said, shown
        said += chunk
        painted = paint(said, finished)
        console.print(painted[shown:], end="", soft_wrap=True)
        shown = len(painted)

    try:
        (done,) = model.answer(question, hear).values()
        hear("", "", finished=True)
    finally:
        console.print()
    note(console, summarise(done, model.task))


def show_side_by_side(console: Console, model: "ChatModel", question: str) -> None:
    """Print the completions of base and adapter in a column each."""
    said, notes = dict.fromkeys(model.sides, ""), {}

    def hear(side: str, chunk: str) -> None:
        said[side] += chunk

    def draw() -> Table:
        table, cells = Table(expand=True), []
        for side in model.sides:
            table.add_column(side, ratio=1, overflow="fold")
            text = paint(said[side], finished=side in notes)
            cells.append(Group(text, Text(notes.get(side, ""), "dim")))
        table.add_row(*cells)
        return table

    with Live(console=console, get_renderable=draw, refresh_per_second=REFRESHES):
        done = model.answer(question, hear)
        notes |= {side: summarise(completion, model.task) for side, completion in done.items()}
    if not console.is_terminal:
        console.line()


def summarise(done: Completion, task: Task) -> str:
    """Return how long a completion is, and what is wrong with it."""
    parts = [f"{done.tokens} token{'' if done.tokens == 1 else 's'}"]
    if done.truncated:
        parts.append("cut off there (--max-completion-length)")
    if task.parse(done.text) is None:
        parts.append("no answer that the strict parser reads")
    return ", ".join(parts)
