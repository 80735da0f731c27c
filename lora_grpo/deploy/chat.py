"""A chat in the terminal with an adapter or a merged model, one question, or questions from a pipe.

Every question is asked alone: the model was trained on single turns and no reward ever judged a
second one, so there is no history to keep. Nothing heavy is imported until a folder is looked at.
"""

import json
import sys
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

from tyro.conf import Positional, arg

from lora_grpo.tasks.task import Task

if TYPE_CHECKING:
    from lora_grpo.deploy.chat_model import ChatModel
    from lora_grpo.policy.generate import Completion

ENDS = ("/exit", "/quit", "exit", "quit")
COMMANDS = "/exit or /quit or Ctrl-D ends, Ctrl-C stops an answer, /help shows this"


@dataclass(frozen=True)
class ChatConfig:
    """Ask an adapter, or a merged model, as it was asked in training: every question alone.

    Without --ask it reads questions from the terminal, or one per line from a pipe.
    """

    folder: Positional[Annotated[Path, arg(metavar="FOLDER")]]
    """An adapter directory such as adapters/<run>, or a merged model such as merged/<run>."""
    ask: str | None = None
    """Ask this one question and end."""
    compare: bool = False
    """Put the same question to the base too, and show both side by side."""
    json: bool = False
    """Print one JSON object per question, with --ask or questions from a pipe: `question`,
    `completion`, `reasoning`, `answer`, `truncated`, `tokens`; with --compare all except the
    question under `base` and `adapter`."""
    model: str | None = None
    """Base to put the adapter on; by default the one that it remembers."""
    load_in_4bit: bool | None = None
    """Hold the base in NF4; by default as it was trained, and a merged model whole."""
    max_completion_length: int | None = None
    """Longest completion in tokens; by default the length trained with, or 512."""
    temperature: float = 0.0
    """0 decodes greedily, as evaluate.py does; training sampled at 1."""
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
    from lora_grpo.deploy.chat_model import ChatModel, Decoding, build_prompt
    from lora_grpo.deploy.chat_screen import note, show
    from lora_grpo.deploy.source import find_source
    from lora_grpo.machine.terminal import make_console

    stdin = stdin or sys.stdin
    at_terminal = config.ask is None and stdin.isatty()
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
    console = make_console()
    if at_terminal:
        drawn = f"sampled at temperature {config.temperature:g}" if config.temperature else "greedy"
        note(console, f"{source.describe()}; {drawn}, up to {length} tokens.")
        note(console, f"Each question is asked alone, earlier ones are forgotten. {COMMANDS}.")
        converse(ChatModel(source, decoding, config.compare))
        return
    lines = stdin if config.ask is None else [config.ask]
    questions = filter(None, (line.strip() for line in lines))
    first = next(questions, None)
    if first is None:
        raise ValueError("no question came on standard input: write one per line, or use --ask")
    build_prompt(source, first, length)  # refuses one that is too long
    model = ChatModel(source, decoding, config.compare)
    for question in chain([first], questions):
        if config.json:
            answered = to_json(question, model.answer(question), source.task)
            print(json.dumps(answered), flush=True)
            continue
        if config.ask is None:
            note(console, f"> {question}")
        show(console, model, question)


def converse(model: "ChatModel") -> None:
    """Ask the person for questions until they end it."""
    from lora_grpo.deploy.chat_screen import note, show
    from lora_grpo.machine.terminal import make_console

    with suppress(ImportError):  # arrow keys, where Python was built with them
        import readline  # noqa: F401
    console = make_console()
    while (question := read_question()) is not None:
        try:
            if question.startswith("/"):
                note(console, COMMANDS)
            elif question:
                show(console, model, question)
        except ValueError as error:  # too long a question
            note(console, str(error))
        except KeyboardInterrupt:
            note(console, "stopped")


def read_question() -> str | None:
    """Return what the person typed, or None at the end."""
    try:
        question = input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    return None if question in ENDS else question


def to_json(question: str, done: "dict[str, Completion]", task: Task) -> dict[str, Any]:
    """Return a question and its answers as scripts read them."""
    sides = {
        side: {
            "completion": completion.text,
            "reasoning": task.parse_reasoning(completion.text),
            "answer": task.parse(completion.text),
            "truncated": completion.truncated,
            "tokens": completion.tokens,
        }
        for side, completion in done.items()
    }
    return {"question": question, **(sides if len(sides) > 1 else sides["adapter"])}
