"""Where rows lie: folders as a clone of a Hub dataset or `datasets` itself has them, the Hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dataset_files import write_rows

from lora_grpo.data.sources import list_splits, read_rows, resolve_split

ROOT = Path(__file__).parents[2]
ROWS = [{"question": f"q{n}", "answer": str(n)} for n in range(6)]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.jsonl", "test.jsonl"),
        ("train.jsonl", "test-00000-of-00001.parquet"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("main/train-00000-of-00001.parquet", "main/test-00000-of-00001.parquet"),
        ("train/part.JSONL", "test/part.JSONL"),
        ("gsm8k_train.jsonl", "gsm8k-test.v2.jsonl"),
        ("training.jsonl", "eval.jsonl"),
        ("train.jsonl", "validation.jsonl"),
    ],
)
def test_the_splits_of_a_folder(tmp_path: Path, train: str, test: str) -> None:
    write_rows(tmp_path / train, ROWS)
    write_rows(tmp_path / test, ROWS[:2])
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "LICENSE.txt").write_text("train on me")
    write_rows(tmp_path / ".cache" / "train.jsonl", ROWS[:1])
    folder = str(tmp_path)
    assert read_rows(folder, resolve_split(folder, "train")).rows == ROWS
    assert read_rows(folder, resolve_split(folder, "test")).rows == ROWS[:2]


def test_shards_are_joined_in_order_and_none_may_be_missing(tmp_path: Path) -> None:
    for number in range(3):
        name = f"data/train-0000{number}-of-00003.parquet"
        write_rows(tmp_path / name, ROWS[2 * number : 2 * number + 2])
    assert read_rows(str(tmp_path), "train").rows == ROWS
    (tmp_path / "data" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="2 of the 3 shards of its train split"):
        read_rows(str(tmp_path), "train")


def test_configurations_are_named_and_each_is_a_folder_to_give(tmp_path: Path) -> None:
    for config in ("algebra", "geometry"):
        write_rows(tmp_path / config / "train-00000-of-00001.parquet", ROWS)
    with pytest.raises(ValueError, match=r"configurations algebra, geometry: .*/algebra"):
        read_rows(str(tmp_path), "train")
    assert read_rows(str(tmp_path / "geometry"), "train").rows == ROWS


def test_a_folder_must_hold_one_file_of_a_split(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"one train file \(\.jsonl.*found no data files"):
        read_rows(str(tmp_path), "train")
    write_rows(tmp_path / "train.jsonl", ROWS)
    write_rows(tmp_path / "train_small.jsonl", ROWS[:1])  # the split's own name comes first
    assert read_rows(str(tmp_path), "train").rows == ROWS
    write_rows(tmp_path / "train.csv", ROWS)
    with pytest.raises(FileNotFoundError, match=r"train\.csv, train\.jsonl, train_small"):
        read_rows(str(tmp_path), "train")


def test_what_stands_for_a_split_that_is_not_there(tmp_path: Path) -> None:
    write_rows(tmp_path / "only_test" / "test.jsonl", ROWS)
    write_rows(tmp_path / "unnamed" / "data" / "dapo-math-17k.parquet", ROWS)
    write_rows(tmp_path / "two" / "train.jsonl", ROWS)
    write_rows(tmp_path / "two" / "dev.jsonl", ROWS[:1])
    only, unnamed, two = (str(tmp_path / name) for name in ("only_test", "unnamed", "two"))
    assert [resolve_split(only, split) for split in ("train", "test")] == ["test", "test"]
    assert list_splits(unnamed) == ["train"] and read_rows(unnamed, "train").rows == ROWS
    assert resolve_split(two, "test") == "validation"
    assert read_rows(two, "validation").rows == ROWS[:1]


def test_folders_that_datasets_saved(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    whole = datasets.Dataset.from_list(ROWS).cast_column("answer", datasets.Value("float32"))
    parts = datasets.DatasetDict({"train": whole.select(range(4)), "test": whole.select([5])})
    parts.save_to_disk(str(tmp_path / "parts"))
    whole.save_to_disk(str(tmp_path / "whole"))
    train = read_rows(str(tmp_path / "parts"), "train").rows
    assert [row["question"] for row in train] == ["q0", "q1", "q2", "q3"]
    assert read_rows(str(tmp_path / "parts"), "test").rows == [{"question": "q5", "answer": 5.0}]
    assert len(read_rows(str(tmp_path / "whole"), "train").rows) == 6
    with pytest.raises(FileNotFoundError, match="has no validation split, it has train, test"):
        read_rows(str(tmp_path / "parts"), "validation")


def test_a_missing_file_is_named_with_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("gone.jsonl", str(tmp_path / "no" / "folder")):
        with pytest.raises(FileNotFoundError, match=f"{name} does not exist: .*{Path.cwd()}"):
            read_rows(name, "train")
    monkeypatch.setenv("HOME", str(tmp_path))
    write_rows(tmp_path / "a.jsonl", ROWS)
    assert read_rows("~/a.jsonl", "train").rows == ROWS


OFFLINE = """
import json, os, time
from pathlib import Path

from datasets import DatasetInfo
from datasets.arrow_writer import ArrowWriter

from lora_grpo.data.problems import load_problems

cached = Path(os.environ["HF_DATASETS_CACHE"]) / "owner___name" / "main" / "0.0.0" / "abc"
cached.mkdir(parents=True)
writer = ArrowWriter(path=str(cached / "name-train.arrow"))
writer.write({"question": "q", "answer": "#### 3"})
writer.finalize()
DatasetInfo(
    features=writer._features, builder_name="parquet", dataset_name="name", config_name="main",
    version="0.0.0", splits={"train": {"name": "train", "num_examples": 1, "dataset_name": "name"}},
).write_to_directory(str(cached))

errors, started = [], time.perf_counter()
for name in ("openai/gsm8k:main", "nosuchset", "a b", "data/folder/that/is/not"):
    try:
        load_problems(name)
    except FileNotFoundError as error:
        errors.append(str(error))
seconds = time.perf_counter() - started
print(json.dumps([errors, seconds, load_problems("owner/name:main")[0].answer]))
"""


def test_a_hub_that_cannot_be_reached_is_said_at_once_and_the_cache_still_serves(
    tmp_path: Path,
) -> None:
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(tmp_path)}
    path = {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        env={**os.environ, **nobody, **path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    errors, seconds, cached = json.loads(done.stdout)
    assert len(errors) == 4 and cached == "3"
    assert seconds < 15  # `datasets` alone takes 25 for each that it can ask the Hub for
    assert errors[0].startswith("--dataset openai/gsm8k:main is no local file")
    assert "the Hub cannot be reached" in errors[0] and "Offline" not in errors[0]
    for error in errors:
        assert "path of a local file" in error and "arithmetic" in error
        assert "\n" not in error
    assert "Retrying" not in done.stderr and "Traceback" not in done.stderr
