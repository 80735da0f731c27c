"""What a person sees of a chat: reasoning dim, the answer prominent, both as they are written; base
and adapter in two columns."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lora_grpo.data.task import NUMBER_TASK
from lora_grpo.deploy.chat_model import ChatModel, Say
from lora_grpo.policy.generate import Completion
from lora_grpo.train.console import LOG_WIDTH

Part = Literal["text", "reasoning", "answer"]

# Answer tags count even where the reasoning was never closed, as they do for the parser that pays.
REASONING, REASONING_END, ANSWER, ANSWER_END = NUMBER_TASK.tags
NEXT: dict[Part, dict[str, Part]] = {
    "text": {REASONING: "reasoning", ANSWER: "answer"},
    "reasoning": {REASONING_END: "text", ANSWER: "answer"},
    "answer": {ANSWER_END: "text"},
}


@dataclass(frozen=True)
class Piece:
    """Some text of one part; `starts` marks the first of a part."""

    part: Part
    text: str
    starts: bool


class TagReader:
    """Splits one completion, however it is cut into chunks."""

    def __init__(self) -> None:
        self.part: Part = "text"
        self.held, self.space, self.begun = "", "", False

    def feed(self, chunk: str) -> list[Piece]:
        """Return what the chunk makes certain."""
        return list(self._split(chunk))

    def close(self) -> list[Piece]:
        """Return what was held back, at the end of the completion."""
        held, self.held = self.held, ""
        return list(self._emit(held))

    def _split(self, chunk: str) -> Iterator[Piece]:
        self.held += chunk
        while found := self._first_tag():
            position, tag = found
            yield from self._emit(self.held[:position])
            self.held = self.held[position + len(tag) :]
            self.part = NEXT[self.part][tag]
            self.space, self.begun = "", False
        safe = len(self.held) - self._may_be_tag()
        text, self.held = self.held[:safe], self.held[safe:]
        yield from self._emit(text)

    def _first_tag(self) -> tuple[int, str] | None:
        places = [(self.held.find(tag), tag) for tag in NEXT[self.part]]
        return min((place for place in places if place[0] >= 0), default=None)

    def _may_be_tag(self) -> int:
        """Return the length of the longest end of the text that begins a tag."""
        tags = NEXT[self.part]
        sizes = range(min(len(self.held), max(map(len, tags)) - 1), 0, -1)
        return next((n for n in sizes if any(t.startswith(self.held[-n:]) for t in tags)), 0)

    def _emit(self, text: str) -> Iterator[Piece]:
        text = self.space + text
        kept = text.rstrip()
        self.space = text[len(kept) :]
        if not self.begun:
            kept, self.space = kept.lstrip(), self.space if kept else ""
        if kept:
            yield Piece(self.part, kept, starts=not self.begun)
            self.begun = True


STYLES: dict[Part, str] = {"text": "", "reasoning": "dim", "answer": "bold green"}
HEADINGS: dict[Part, str] = {"text": "", "reasoning": "reasoning", "answer": "answer"}
REFRESHES = 12


class Screen:
    """Shows one completion, or two side by side, on one console."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        if not self.console.is_terminal:
            self.console.width = LOG_WIDTH

    def note(self, text: str) -> None:
        """Print a line that is not the model's."""
        self.console.print(text, style="dim", markup=False, soft_wrap=True)

    def answer(self, chat: ChatModel, question: str, side: str) -> None:
        """Print a completion as it is written."""
        reader, begun = TagReader(), False

        def show(pieces: list[Piece]) -> None:
            nonlocal begun
            for piece in pieces:
                self.console.print(paint(piece, first=not begun), end="", soft_wrap=True)
                begun = True

        try:
            done = chat.answer(question, {side: lambda chunk: show(reader.feed(chunk))})[side]
            show(reader.close())
        finally:
            self.console.print()
        self.note(summarise(done))

    def compare(self, chat: ChatModel, question: str) -> None:
        """Print base and adapter in two columns, each as it is written."""
        columns = {"base": Text(), "adapter": Text()}
        readers = {side: TagReader() for side in columns}

        def add(side: str, pieces: list[Piece]) -> None:
            for piece in pieces:
                columns[side].append_text(paint(piece, first=not columns[side]))

        def hear(side: str) -> Say:
            return lambda chunk: add(side, readers[side].feed(chunk))

        notes = dict.fromkeys(columns, "")
        with Live(
            console=self.console,
            get_renderable=lambda: side_by_side(columns, notes),
            refresh_per_second=REFRESHES,
        ):
            done = chat.answer(question, {side: hear(side) for side in columns})
            for side, reader in readers.items():
                add(side, reader.close())
                notes[side] = summarise(done[side])
        if not self.console.is_terminal:
            self.console.line()


def paint(piece: Piece, first: bool) -> Text:
    """Return a piece in its part's style, with a heading where a part starts."""
    text = Text()
    if piece.starts:
        text.append("" if first else "\n")
        if heading := HEADINGS[piece.part]:
            text.append(f"{heading}\n", "underline")
    # A model's escape codes are not for the terminal to obey.
    return text.append(piece.text.replace("\x1b", "\u241b"), STYLES[piece.part])


def side_by_side(columns: dict[str, Text], notes: dict[str, str]) -> Table:
    table = Table(expand=True, show_lines=False)
    for name in columns:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*(Group(columns[name], Text(notes[name], "dim")) for name in columns))
    return table


def summarise(done: Completion) -> str:
    """Return how long a completion is, and what is wrong with it."""
    parts = [f"{done.tokens} token{'' if done.tokens == 1 else 's'}"]
    if done.truncated:
        parts.append("cut off there (--max-completion-length)")
    if NUMBER_TASK.parse(done.text) is None:
        parts.append("no answer that the strict parser reads")
    return ", ".join(parts)


Show = Callable[[str], None]


def make_show(screen: Screen, chat: ChatModel, compare: bool, side: str) -> Show:
    """Return what shows the answer to a question."""
    if compare:
        return lambda question: screen.compare(chat, question)
    return lambda question: screen.answer(chat, question, side)
