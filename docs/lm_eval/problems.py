"""The problems that lm-evaluation-harness asks: each with its gold answer and the run's prompt.

The harness hands over what `--model_args` and `--metadata` hold. The run's records, which tell its
system prompt, are `records` if that is given, else the adapter (`peft`) or the model
(`pretrained`). This imports nothing of the project, as an outside check should not.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import DatasetDict

TRAIN_CONFIG, ITEMS = "train_config.json", "eval_items.jsonl"
GSM8K = "openai/gsm8k"


def find_records(settings: dict[str, Any], name: str) -> Path:
    """Return the run's file of this name.

    Raises:
        FileNotFoundError: the folder that should hold it does not.
    """
    given = settings.get("records") or settings.get("peft") or settings.get("pretrained") or ""
    path = Path(given) / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{given!r} holds no {name}: add --metadata records=DIR, where DIR is the adapter "
            "directory or merged folder of the run (of a Hub repository, a download)"
        )
    return path


def read_system_prompt(settings: dict[str, Any]) -> str:
    """Return the system prompt that the run was trained with.

    Raises:
        FileNotFoundError: the run cannot be found.
        ValueError: it was trained with a worked example, which these tasks do not show.
    """
    path = find_records(settings, TRAIN_CONFIG)
    saved = json.loads(path.read_text(encoding="utf-8"))
    if saved.get("example"):
        raise ValueError(
            f"{path} says --one-shot: these tasks ask without an example, so that their figures "
            "would not be the run's; use scripts/evaluate.py"
        )
    return saved["system_prompt"]


def ask(rows: list[dict[str, str]], settings: dict[str, Any]) -> "DatasetDict":
    """Return the rows, each with the system prompt, as the split `test`."""
    from datasets import Dataset, DatasetDict

    system_prompt = read_system_prompt(settings)
    return DatasetDict(
        test=Dataset.from_list([{**row, "system_prompt": system_prompt} for row in rows])
    )


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def load_items(**settings: Any) -> "DatasetDict":
    """Return the problems of a run's eval_items.jsonl, in its order."""
    rows = read_jsonl(find_records(settings, ITEMS))
    return ask([{key: row[key] for key in ("question", "answer")} for row in rows], settings)


def load_gsm8k(**settings: Any) -> "DatasetDict":
    """Return GSM8K's test split, the gold answer being what follows `####`."""
    if "gsm8k" in settings:
        rows = read_jsonl(Path(settings["gsm8k"]) / "test.jsonl")
    else:
        from datasets import load_dataset

        rows = load_dataset(GSM8K, "main", split="test")
    return ask(
        [
            {
                "question": row["question"].strip(),
                "answer": row["answer"].rpartition("####")[2].strip(),
            }
            for row in rows
        ],
        settings,
    )
