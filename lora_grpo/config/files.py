"""Settings from a file: a `--config` in YAML or JSON, or the record of a run to resume.

A path goes in; the settings that the file names come out, by name and of their field's type.
"""

import difflib
import json
import typing
from collections.abc import Set
from pathlib import Path
from typing import Any

from lora_grpo.config.train_config import VLLM_CORRECTION, TrainConfig, loss_defaults
from lora_grpo.machine.folders import RUN_FILE, check_kind, kind_of

SETTINGS = typing.get_type_hints(TrainConfig)
FLAGS_ONLY = frozenset({"config", "resume"})
OF_ONE_CALL = frozenset({"quiet", "dry_run", "preview", "length_preview"})
RECORD_MARK = "dataset_sha256"
# How runs went whose records lack a setting that is newer than they are.
OLD_RECORDS = {"task": "number"}


def given_settings(record: dict[str, Any]) -> dict[str, Any]:
    """Return a run's record without the nulls of settings that the run did not use, and without the
    defaults of its loss, so that another loss gets its own."""
    loss, level = record.get("loss_type", TrainConfig.loss_type), "importance_sampling_level"
    own = loss_defaults(loss, record.get(level)) | VLLM_CORRECTION
    own[level] = loss_defaults(loss)[level]
    unread = {"epsilon", "epsilon_high"} - own.keys()

    def decided(name: str, value: Any) -> bool:
        never_null = name in SETTINGS and type(None) not in typing.get_args(SETTINGS[name])
        from_loss = name in own and own[name] == value
        return name in unread or from_loss or (value is None and never_null)

    return {name: value for name, value in record.items() if not decided(name, value)}


def convert(value: Any, kind: Any) -> Any:
    """Return a JSON or YAML value as a setting's type.

    Raises:
        TypeError, ValueError: it is of another type.
    """
    choices = typing.get_args(kind)
    if type(None) in choices:
        return None if value is None else convert(value, choices[0])
    if typing.get_origin(kind) is typing.Literal:
        if any(value == choice and type(value) is type(choice) for choice in choices):
            return value
    elif typing.get_origin(kind) is tuple:
        if isinstance(value, list):
            return tuple(convert(item, choices[0]) for item in value)
    elif kind is float and not isinstance(value, bool):
        return float(value)  # YAML 1.1 takes 1e-5 for text
    elif kind is Path:
        return Path(value)
    elif type(value) is kind:
        return value
    raise TypeError


def describe_type(kind: Any) -> str:
    """Return a setting's type in words."""
    choices = typing.get_args(kind)
    if type(None) in choices:
        return f"{describe_type(choices[0])} or null"
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, choices))}"
    if typing.get_origin(kind) is tuple:
        return "a list of text"
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "text")


def convert_all(path: Path, values: dict[str, Any], names: Set[str]) -> dict[str, Any]:
    """Return the named settings that a file holds.

    Raises:
        ValueError: a value is of the wrong type.
    """
    settings = {}
    for name in [name for name in values if name in names]:
        try:
            settings[name] = convert(values[name], SETTINGS[name])
        except (TypeError, ValueError):
            raise ValueError(
                f"{path}: {name} must be {describe_type(SETTINGS[name])}, got {values[name]!r:.60}"
            ) from None
    return settings


def read_mapping(path: Path) -> dict[str, Any]:
    """Return what a JSON or YAML file holds, by name.

    Raises:
        ValueError: the text is broken, or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = json.loads(text) if path.suffix == ".json" else parse_yaml(path, text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: broken JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}): convert it") from None
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} must hold settings as `name: value`, got {type(values).__name__}: see --help "
            "for the settings"
        )
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def parse_yaml(path: Path, text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        raise ValueError(
            f"{path}, line {error.problem_mark.line + 1}: broken YAML ({error.problem})"
        ) from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: broken YAML ({' '.join(str(error).split())})") from None


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the settings of a `--config` file: YAML, JSON, or a run's train_config.json, whose
    extra keys, run name and output flags are ignored.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is broken, or holds an unknown key.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--config {path} does not exist: give a {RUN_FILE} or a YAML file")
    try:
        values = read_mapping(path)
        is_record = RECORD_MARK in values
        names = SETTINGS.keys() - FLAGS_ONLY - (OF_ONE_CALL | {"run_name"} if is_record else set())
        for key in values:
            if key not in names and not is_record:
                close = difflib.get_close_matches(key, names, n=1)
                hint = f"perhaps you meant {close[0]}" if close else "see --help for the settings"
                raise ValueError(f"{path}: unknown key {key}: {hint}")
        if is_record:
            values = given_settings(OLD_RECORDS | values)
        return convert_all(path, values, names)
    except ValueError as error:
        raise ValueError(f"--config {error}") from None


def read_base(adapter: Path) -> dict[str, Any]:
    """Return the base of an adapter's folder as settings, and how its run loaded it; nothing where
    the folder does not say."""
    run, plain = (
        read_mapping(path) if path.is_file() else {}
        for path in (adapter / RUN_FILE, adapter / "adapter_config.json")
    )
    if run.get("model"):
        return convert_all(adapter / RUN_FILE, run, {"model", "load_in_4bit"})
    model = plain.get("base_model_name_or_path")
    return {"model": model} if isinstance(model, str) and model else {}


def read_run(run_dir: Path) -> dict[str, Any]:
    """Return the settings that a run began with; `max_steps` is the number of its steps.

    Raises:
        FileNotFoundError: the directory holds no run.
        ValueError: its record is broken.
    """
    path = run_dir / RUN_FILE
    if not path.is_file() and kind_of(run_dir) in ("adapter", "other"):
        raise FileNotFoundError(
            f"--resume {run_dir} holds no {RUN_FILE}: give the directory of a run, such as "
            "adapters/tiny"
        )
    try:
        check_kind(run_dir, "train_lora.py", "the folder of a run, which it wrote itself", ("run",))
        values = read_mapping(path)
        values = OLD_RECORDS | values
        values["max_steps"] = values.get("steps", values.get("max_steps"))
        return convert_all(path, given_settings(values), SETTINGS.keys() - FLAGS_ONLY - OF_ONE_CALL)
    except ValueError as error:
        raise ValueError(f"--resume {error}") from None
