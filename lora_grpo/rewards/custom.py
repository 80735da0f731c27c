"""Load a user's own reward from `path/to/file.py:function=weight`.

The function has TRL's signature, `(completions, **columns) -> list[float | None]`, plain or async;
None means "does not apply". It gets completions as plain strings, in training as in checking.
"""

import hashlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from lora_grpo.rewards.calls import Calls, OwnReward, describe_error


def load_custom_reward(spec: str, calls: Calls) -> tuple[str, OwnReward, float, str]:
    """Return name, function and weight of `path/to/file.py:function=weight` (1.0 if left), and the
    SHA-256 of the file.

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
    return name, OwnReward(name, find_function(module, path, name), calls), number, sha256


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


def import_file(path: Path, flag: str = "--reward") -> tuple[ModuleType, str]:
    """Return the module and the SHA-256 of its file."""
    if path.suffix != ".py":
        raise ValueError(f"{flag} must name a .py file, got {path}")
    if not path.is_file():
        raise FileNotFoundError(
            f"{flag} {path} does not exist: check the path (relative to {Path.cwd()})"
        )
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    # Two files of one name are two modules.
    spec = importlib.util.spec_from_file_location(f"custom_reward_{path.stem}_{sha256}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up here
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{flag} {path} cannot be imported: {describe_error(error)}") from error
    return module, sha256


def find_function(
    module: ModuleType, path: str, name: str, flag: str = "--reward"
) -> Callable[..., Any]:
    function = getattr(module, name, None)
    if not callable(function) or inspect.isclass(function):
        own = [
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__
        ]
        raise ValueError(
            f"{flag} {path} has no function {name!r}: it has {', '.join(own) or 'none'}"
        )
    kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        raise ValueError(
            f"{flag} {path}:{name} must end its parameters with **columns: "
            "the trainer passes every column of the dataset"
        )
    return function
