"""A chat in the terminal with an adapter or a merged model, one question, or questions from a pipe.

Every question is asked alone: the model was trained on single turns and no reward ever judged a
second one, so there is no history to keep. Nothing heavy is imported until a folder is looked at.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

from tyro.conf import Positional, arg

from lora_grpo.data.task import NUMBER_TASK

if TYPE_CHECKING:
    from lora_grpo.deploy.chat_model import ChatModel, Decoding
    from lora_grpo.deploy.source import ChatSource
    from lora_grpo.policy.generate import Completion

ENDS, HELPS = ("/exit", "/quit", "/bye", "exit", "quit"), ("/help", "/?", "help", "?")
COMMANDS = "/exit or /quit or Ctrl-D ends, Ctrl-C stops an answer, /help shows this"


@dataclass(frozen=True)
class ChatConfig:
    """Ask an adapter, or a merged model, as it was asked in training: every question alone.

    Without --ask it reads questions from the terminal, or one a line from a pipe.
    """

    folder: Positional[Annotated[Path, arg(metavar="FOLDER")]]
    """An adapter directory such as adapters/<run>, or a merged model such as merged/<run>."""
    ask: str | None = None
    """Ask this one question and end."""
    compare: bool = False
    """Put the same question to the base too, and show both side by side."""
    json: bool = False
    """Print one JSON object a question, with --ask or questions from a pipe: `question`,
    `completion`, `reasoning`, `answer`, `truncated`, `tokens`; with --compare all but the question
    under `base` and `adapter`."""
    model: str | None = None
    """Base to put the adapter on; by default the one that it remembers."""
    load_in_4bit: bool | None = None
    """Hold the base in NF4; by default as it was trained, and a merged model whole."""
    max_completion_length: int | None = None
    """Longest completion in tokens; by default the length trained with, or 512."""
    temperature: float = 0.0
    """0 answers greedily, as evaluate.py does; training sampled at 1."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that come to this share; needs --temperature above 0."""
    seed: int = 0
    """Seeds the sampling of the first question; each further one takes the next seed."""

    def __post_init__(self) -> None:
        if self.ask is not None and not self.ask.strip():
            raise ValueError("--ask is blank: write the question in it")
        if self.max_completion_length is not None and self.max_completion_length < 1:
            raise ValueError(
                f"--max-completion-length must be at least 1, got {self.max_completion_length}"
            )
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p must be above 0 and at most 1, got {self.top_p}")
        if self.top_p < 1 and self.temperature == 0:
            raise ValueError(
                f"--top-p {self.top_p} changes nothing at temperature 0: add --temperature 1"
            )


def chat(config: ChatConfig, stdin: TextIO | None = None) -> None:
    """Answer questions until there are no more.

    Raises:
        FileNotFoundError, ValueError: nothing to load or to ask, each before any weights load.
        KeyboardInterrupt: Ctrl-C, but not while a person at a terminal waits for an answer.
    """
    from lora_grpo.deploy.chat_model import Decoding, make_prompter, open_chat
    from lora_grpo.deploy.source import find_source

    stdin = stdin or sys.stdin
    at_terminal = config.ask is None and stdin is not None and stdin.isatty()
    if config.json and at_terminal:
        raise ValueError("--json needs --ask, or questions from a pipe: add --ask 'a question'")
    source = find_source(config.folder, config.model, config.load_in_4bit)
    if config.compare and source.adapter_dir is None:
        raise ValueError(
            f"--compare needs an adapter directory, and {config.folder} is a whole model without a "
            "base beside it: give adapters/<run>"
        )
    length = config.max_completion_length or source.record.max_completion_length
    decoding = Decoding(length, config.temperature, config.top_p, config.seed)
    prompter = make_prompter(source, length)
    questions: Iterable[str] = ()
    if not at_terminal:
        questions = given_questions(config.ask, stdin, prompter.prompt)
    else:
        greet(source, decoding)
    with open_chat(source, prompter, decoding) as model:
        if at_terminal:
            converse(model, config.compare)
        else:
            answer_all(model, questions, config)


def given_questions(
    ask: str | None, stdin: TextIO | None, check: Callable[[str], object]
) -> Iterator[str]:
    """Return the questions of --ask or a pipe, the first of which is there and was checked."""
    lines = [ask] if ask is not None else (stdin or [])
    questions = filter(None, (line.strip() for line in lines))
    first = next(questions, None)
    if first is None:
        raise ValueError("no question came on standard input: write one a line, or use --ask")
    check(first)
    return chain([first], questions)


def greet(source: "ChatSource", decoding: "Decoding") -> None:
    """Say what answers, how, and how to end it."""
    from lora_grpo.deploy.chat_screen import Screen

    drawn = f"sampled at temperature {decoding.temperature:g}" if decoding.temperature else "greedy"
    screen = Screen()
    screen.note(f"{source.describe()}; {drawn}, up to {decoding.max_completion_length} tokens.")
    screen.note(
        "Each question is asked alone, as in training: earlier ones are not remembered. "
        f"{COMMANDS}."
    )


def converse(model: "ChatModel", compare: bool) -> None:
    """Ask the person for questions until they end it."""
    from lora_grpo.deploy.chat_screen import Screen, make_show

    with suppress(ImportError):  # arrow keys, where Python was built with them
        import readline  # noqa: F401
    screen = Screen()
    show = make_show(screen, model, compare, "adapter")
    while (question := read_question()) is not None:
        try:
            if question in HELPS:
                screen.note(COMMANDS)
            elif re.fullmatch(r"/[a-z]+", question):
                screen.note(f"there is no command {question}: {COMMANDS}")
            elif question:
                show(question)
        except ValueError as error:  # too long a question
            screen.note(str(error))
        except KeyboardInterrupt:
            screen.note("stopped")


def read_question() -> str | None:
    """Return what the person typed, or None at the end."""
    try:
        question = input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    return None if question in ENDS else question


def answer_all(model: "ChatModel", questions: Iterable[str], config: ChatConfig) -> None:
    """Print the answers to given questions, as text or as JSON."""
    from lora_grpo.deploy.chat_screen import Screen, make_show

    if config.json:
        for question in questions:
            print(json.dumps(answer_as_json(model, question, config.compare)), flush=True)
        return
    screen = Screen()
    show = make_show(screen, model, config.compare, "adapter")
    for question in questions:
        if config.ask is None:
            screen.note(f"> {question}")
        show(question)


def answer_as_json(model: "ChatModel", question: str, compare: bool) -> dict[str, Any]:
    """Return a question and its answer as scripts read it."""
    sides = ("base", "adapter") if compare else ("adapter",)
    done = model.answer(question, {side: lambda chunk: None for side in sides})
    if compare:
        return {"question": question, **{side: as_json(done[side]) for side in sides}}
    return {"question": question, **as_json(done["adapter"])}


def as_json(done: "Completion") -> dict[str, Any]:
    return {
        "completion": done.text,
        "reasoning": NUMBER_TASK.parse_reasoning(done.text),
        "answer": NUMBER_TASK.parse(done.text),
        "truncated": done.truncated,
        "tokens": done.tokens,
    }
