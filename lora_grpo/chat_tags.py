"""Text that streams in becomes reasoning, answer and plain text, tag by tag.

A tag may arrive in pieces, so what could still become one is held back, as is white space, which
counts only inside a part. A text without tags comes out as it is.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Part = Literal["text", "reasoning", "answer"]

# Answer tags count even where the reasoning was never closed, as they do for the parser that pays.
NEXT: dict[Part, dict[str, Part]] = {
    "text": {"<reasoning>": "reasoning", "<answer>": "answer"},
    "reasoning": {"</reasoning>": "text", "<answer>": "answer"},
    "answer": {"</answer>": "text"},
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


def parse_reasoning(completion: str) -> str | None:
    """Return the stripped text between the reasoning tags, or None unless there is one of each."""
    if completion.count("<reasoning>") != 1 or completion.count("</reasoning>") != 1:
        return None
    inside, closed, _ = completion.partition("<reasoning>")[2].partition("</reasoning>")
    return inside.strip() if closed else None
