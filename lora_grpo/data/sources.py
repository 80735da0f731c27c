"""Where a dataset's rows lie: a local file or folder, the Hub, the built-in arithmetic,
or the generators of `reasoning-gym`.

A dataset's name and a split go in, its rows come out; or a name goes in, and its splits come out.
"""

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_grpo.data.arithmetic import SPLITS, generate_problems
from lora_grpo.data.procedural import SPLITS as PROCEDURAL_SPLITS
from lora_grpo.data.procedural import read_procedural
from lora_grpo.data.tables import READERS, Table, arrow_rows, endings, is_data_file, read_file
from lora_grpo.tasks.reasoning_gym import PREFIX

if TYPE_CHECKING:
    import datasets

BUILT_IN = "arithmetic"
BUILT_IN_ROWS = {"train": 4000, "validation": 256, "test": 512}
HUB_SECONDS = 10
# The words by which `datasets` knows a split from a file's or folder's name.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# JSON files that stand beside the data of a clone or of a saved dataset, and describe it.
DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
SAVED = ("dataset_dict.json", "state.json")
SHARD = re.compile(r"-\d+-of-0*(\d+)\b")


def split_in(part: str) -> str | None:
    """Return the split that a file's or a folder's name speaks of."""
    words = re.split(r"[^a-z]+", part.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


def list_files(folder: Path) -> dict[str, list[Path]]:
    """Return the data files by split of a folder, as a clone of a Hub dataset has them: of its one
    configuration (a subfolder), or of its own. Where no name speaks of a split, all are `train`.

    Raises:
        ValueError: several configurations, and none is the default.
    """
    configs: dict[str, dict[str, list[Path]]] = {}
    unnamed: list[Path] = []
    for path in sorted(path for depth in ("*", "*/*", "*/*/*") for path in folder.glob(depth)):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        # A .txt file beside data is a licence or a list of requirements.
        readable = path.is_file() and is_data_file(path) and endings(path)[0] != ".txt"
        if hidden or path.name in DESCRIPTIONS or not readable:
            continue
        split = next(filter(None, map(split_in, reversed(parts))), None)
        if split is None:
            unnamed.append(path)
            continue
        config = "/".join(part for part in parts[:-1] if part != "data" and not split_in(part))
        configs.setdefault(config, {}).setdefault(split, []).append(path)
    for name in ("", "default"):
        if name in configs:
            return configs[name]
    if len(configs) > 1:
        raise ValueError(
            f"{folder} holds the configurations {', '.join(configs)}: give the path of one, such "
            f"as {folder / next(iter(configs))}"
        )
    return next(iter(configs.values()), {"train": unnamed} if unnamed else {})


def find_in_folder(folder: Path, split: str) -> list[Path]:
    """Return the file of a split, or its shards in order, `train-00000-of-00002.parquet`.

    Raises:
        FileNotFoundError: there is none, more than one, or a shard is missing.
    """
    splits = list_files(folder)
    by_name: dict[str, list[Path]] = {}
    for path in splits.get(split, []):
        by_name.setdefault(re.sub(r"\d+", "0", str(path)), []).append(path)
    groups = list(by_name.values())
    # `train.jsonl` before `train_small.jsonl`
    exact = [files for files in groups if re.split(r"[-.]", files[0].name)[0] == split]
    if len(exact or groups) != 1:
        files = sorted({path for paths in splits.values() for path in paths})
        found = ", ".join(str(path.relative_to(folder)) for path in files) or "no data files"
        raise FileNotFoundError(
            f"{folder} must hold one {split} file ({', '.join(READERS)}) or its shards, found "
            f"{found}: add it, or give the path of a file"
        )
    [files] = exact or groups
    shard = SHARD.search(files[0].name)
    if shard and int(shard[1]) != len(files):
        raise FileNotFoundError(
            f"{folder} holds {len(files)} of the {shard[1]} shards of its {split} split: get the "
            "others too, or give the path of one file"
        )
    return files


def is_saved(path: Path) -> bool:
    """Return whether `datasets` wrote a folder by `save_to_disk`."""
    return any((path / name).is_file() for name in SAVED)


@functools.lru_cache(maxsize=2)
def load_saved(folder: Path) -> "dict[str, datasets.Dataset]":
    """Return the splits of a folder that `save_to_disk` wrote; a single dataset is `train`."""
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} cannot be loaded as a saved dataset ({error})") from error
    return dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}


def hub_answers(repository: str) -> bool:
    """Return whether the Hub can be reached; `datasets` would retry for half a minute to find
    out."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(repository, timeout=HUB_SECONDS)
    except HfHubHTTPError:
        return True
    except (httpx.HTTPError, OSError):
        return False
    return True


@functools.lru_cache(maxsize=2)
def load_hub(name: str) -> "dict[str, datasets.Dataset]":
    """Return the splits of a Hub dataset, `owner/name` or `owner/name:config`; from the cache where
    the Hub cannot be reached."""
    import datasets
    import httpx
    from datasets.exceptions import DatasetsError

    repository, _, config = name.partition(":")
    datasets.disable_progress_bars()
    try:
        datasets.config.HF_HUB_OFFLINE |= not hub_answers(repository)
        return dict(datasets.load_dataset(repository, config or None))
    except (OSError, ValueError, RuntimeError, DatasetsError, httpx.HTTPError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ConnectionError) and datasets.config.HF_HUB_OFFLINE:
            reason = "the Hub cannot be reached, and no earlier download is in the cache"
        raise FileNotFoundError(
            f"{name} is no local file, and the Hub did not give it ({reason}): name a "
            "configuration as owner/name:config, or give the path of a local file, or "
            "`arithmetic`, which is built in"
        ) from error


def find_local(dataset: str) -> Path | None:
    """Return the file or folder that a dataset's name means, or None where it is a Hub id.

    Raises:
        FileNotFoundError: the name is that of a file, and there is none.
    """
    path = Path(dataset).expanduser()
    if path.exists():
        return path
    if is_data_file(path) or dataset.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"{dataset} does not exist: check the path (relative to {Path.cwd()})"
        )
    return None


def list_splits(dataset: str) -> list[str]:
    """Return the splits of a dataset, none for a single file."""
    if dataset == BUILT_IN:
        return list(SPLITS)
    if dataset.startswith(PREFIX):
        return list(PROCEDURAL_SPLITS)
    path = find_local(dataset)
    if path is None:
        return list(load_hub(dataset))
    if path.is_file():
        return []
    return list(load_saved(path) if is_saved(path) else list_files(path))


def resolve_split(dataset: str, wanted: str) -> str:
    """Return the wanted split, or what stands for it where a dataset lacks it: validation for test,
    or the only one that there is. A single file is any split."""
    splits = list_splits(dataset)
    if wanted in splits or not splits:
        return wanted
    if wanted == "test" and "validation" in splits:
        return "validation"
    return splits[0] if len(splits) == 1 else wanted


def read_rows(dataset: str, split: str) -> Table:
    """Return the rows of a dataset by the kind of its name.

    Raises:
        FileNotFoundError, ValueError: no such dataset or split, or broken data.
    """
    if dataset == BUILT_IN:
        return Table(generate_problems(BUILT_IN_ROWS.get(split, 0), split))
    if dataset.startswith(PREFIX):
        return read_procedural(dataset, split)
    path = find_local(dataset)
    if path is not None and path.is_file():
        return read_file(path, split)
    if path is not None and not is_saved(path):
        tables = [read_file(file, split) for file in find_in_folder(path, split)]
        rows: list[dict[str, Any]] = [row for table in tables for row in table.rows]
        return Table(rows, tuple(dict.fromkeys(note for table in tables for note in table.notes)))
    splits = load_hub(dataset) if path is None else load_saved(path)
    if split not in splits:
        raise FileNotFoundError(
            f"{dataset} has no {split} split, it has {', '.join(splits)}: give the file of one"
        )
    return Table(arrow_rows(splits[split].with_format("arrow")[:]))
