"""What a person sees of a chat: reasoning dim, the answer prominent, both as they are written; base
and adapter in two columns."""

from collections.abc import Callable

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lora_grpo.answers import parse_answer
from lora_grpo.chat_model import ChatModel, Say
from lora_grpo.chat_tags import Part, Piece, TagReader
from lora_grpo.console import LOG_WIDTH
from lora_grpo.rollout import Completion

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
    if parse_answer(done.text) is None:
        parts.append("no answer that the strict parser reads")
    return ", ".join(parts)


Show = Callable[[str], None]


def make_show(screen: Screen, chat: ChatModel, compare: bool, side: str) -> Show:
    """Return what shows the answer to a question."""
    if compare:
        return lambda question: screen.compare(chat, question)
    return lambda question: screen.answer(chat, question, side)
