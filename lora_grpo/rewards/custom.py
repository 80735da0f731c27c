"""Load a user's own reward from `path/to/file.py:function=weight` and guard its calls.

The function has TRL's signature, `(completions, **columns) -> list[float | None]`; None means "does
not apply". It gets completions as plain strings, in training as in checking. An error in it stops
the run and shows the reward's name and the completion.
"""

import hashlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, SupportsFloat

from lora_grpo.machine.terminal import FailedError

RewardFunction = Callable[..., list[float | None]]
Completion = str | list[dict[str, Any]]
LONGEST_SHOWN = 300


class RewardError(FailedError):
    """A user's reward function raised; the message shows the completion that it was given."""


def to_texts(completions: list[Completion]) -> list[str]:
    """Return each completion's text; a conversational one is a list whose last message counts."""
    return [text if isinstance(text, str) else text[-1]["content"] for text in completions]


def load_custom_reward(spec: str) -> tuple[str, RewardFunction, float, str]:
    """Return name, guarded function and weight of `path/to/file.py:function=weight` (1.0 if left),
    and the SHA-256 of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the text is not of that form, the file fails on import, or the function is not
            there or cannot be a reward.
    """
    path, colon, call = spec.rpartition(":")
    name, equals, weight = call.partition("=")
    if not (colon and path and name):
        raise ValueError(f"--reward must look like path/to/file.py:function=0.5, got {spec!r}")
    number = parse_weight("--reward", weight, spec) if equals else 1.0
    module, sha256 = import_file(Path(path).expanduser())
    return name, guard(name, find_function(module, path, name)), number, sha256


def parse_weight(flag: str, text: str, spec: str) -> float:
    """Return the weight after the equals sign of a flag's value.

    Raises:
        ValueError: it is not a finite number.
    """
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError(f"{flag} {spec}: the weight must be a number such as 0.5, got {text!r}")
    return weight


def import_file(path: Path) -> tuple[ModuleType, str]:
    """Return the module and the SHA-256 of its file."""
    if path.suffix != ".py":
        raise ValueError(f"--reward must name a .py file, got {path}")
    if not path.is_file():
        raise FileNotFoundError(
            f"--reward {path} does not exist: check the path (relative to {Path.cwd()})"
        )
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    # Two files of one name are two modules.
    spec = importlib.util.spec_from_file_location(f"custom_reward_{path.stem}_{sha256}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up here
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"--reward {path} cannot be imported: {describe_error(error)}") from error
    return module, sha256


def find_function(module: ModuleType, path: str, name: str) -> Callable[..., Any]:
    function = getattr(module, name, None)
    if not callable(function) or inspect.isclass(function):
        own = [
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__
        ]
        raise ValueError(
            f"--reward {path} has no function {name!r}: it has {', '.join(own) or 'none'}"
        )
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"--reward {path}:{name} is an async function: make it a plain `def`")
    kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        raise ValueError(
            f"--reward {path}:{name} must end its parameters with **columns: "
            "the trainer passes every column of the dataset"
        )
    return function


def guard(name: str, function: Callable[..., Any]) -> RewardFunction:
    """Wrap a user's function so that its errors and wrong results name the reward and stop the run.

    The wrapper raises:
        RewardError: the function raised; says on which completion.
        ValueError: the function returned something else than one number or None per completion.
    """

    def guarded(completions: list[Completion], **columns: Any) -> list[float | None]:
        texts = to_texts(completions)
        try:
            values = function(completions=texts, **columns)
        except Exception as error:
            culprit = find_culprit(function, texts, columns)
            raise RewardError(
                f"reward {name!r} raised {describe_error(error)}, on {culprit}: mend the function "
                "(it gets completions as plain strings)"
            ) from error
        return check_values(name, values, len(texts))

    guarded.__name__ = name
    return guarded


def describe_error(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if frame.filename != __file__ and frame.filename[0] != "<"]
    where = f" at {Path(users[-1].filename).name}:{users[-1].lineno}" if users else ""
    reason = f" ({error})" if str(error) else ""
    return f"{type(error).__name__}{reason}{where}"


def find_culprit(function: Callable[..., Any], texts: list[str], columns: dict[str, Any]) -> str:
    """Return the first completion that fails on its own too, or say that only the batch fails."""
    for index, text in enumerate(texts):
        alone = {
            key: [value[index]] if isinstance(value, list) and len(value) == len(texts) else value
            for key, value in columns.items()
        }
        try:
            function(completions=[text], **alone)
        except Exception:
            return f"the completion {text!r:.{LONGEST_SHOWN}}"
    return f"a batch of {len(texts)}, the first completion {texts[0]!r:.{LONGEST_SHOWN}}"


def check_values(name: str, values: Any, expected: int) -> list[float | None]:
    if not isinstance(values, Iterable) or isinstance(values, str | dict):
        raise ValueError(
            f"reward {name!r} must return a list of numbers, one per completion, got {values!r:.60}"
        )
    listed = list(values)
    if len(listed) != expected:
        raise ValueError(
            f"reward {name!r} returned {len(listed)} values for {expected} completions: "
            "return exactly one per completion, None where the reward does not apply"
        )
    for value in listed:
        number = value is None or (isinstance(value, SupportsFloat) and math.isfinite(float(value)))
        if not number:
            raise ValueError(
                f"reward {name!r} returned {value!r:.60}: "
                "return a finite number, or None where the reward does not apply"
            )
    return [None if value is None else float(value) for value in listed]
