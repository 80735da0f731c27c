"""Folders as a clone of a Hub dataset, or `datasets` itself, has them."""

import json
from pathlib import Path

import pytest

from lora_grpo.data.sources import list_splits, read_rows, resolve_split

ROWS = [{"question": f"q{n}", "answer": str(n)} for n in range(6)]


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.jsonl", "test.jsonl"),
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
    write(tmp_path / train, ROWS)
    write(tmp_path / test, ROWS[:2])
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "LICENSE.txt").write_text("train on me")
    write(tmp_path / ".cache" / "train.jsonl", ROWS[:1])
    folder = str(tmp_path)
    assert read_rows(folder, resolve_split(folder, "train")).rows == ROWS
    assert read_rows(folder, resolve_split(folder, "test")).rows == ROWS[:2]


def test_shards_are_joined_in_order_and_none_may_be_missing(tmp_path: Path) -> None:
    for number in range(3):
        name = f"data/train-0000{number}-of-00003.parquet"
        write(tmp_path / name, ROWS[2 * number : 2 * number + 2])
    assert read_rows(str(tmp_path), "train").rows == ROWS
    (tmp_path / "data" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="2 of the 3 shards of its train split"):
        read_rows(str(tmp_path), "train")


def test_configurations_are_named_and_each_is_a_folder_to_give(tmp_path: Path) -> None:
    for config in ("algebra", "geometry"):
        write(tmp_path / config / "train-00000-of-00001.parquet", ROWS)
    with pytest.raises(ValueError, match=r"configurations algebra, geometry: .*/algebra"):
        read_rows(str(tmp_path), "train")
    assert read_rows(str(tmp_path / "geometry"), "train").rows == ROWS


def test_a_name_that_is_the_split_s_own_comes_first(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "train_small.jsonl", ROWS[:1])
    assert read_rows(str(tmp_path), "train").rows == ROWS


def test_what_stands_for_a_split_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path / "only_test" / "test.jsonl", ROWS)
    write(tmp_path / "unnamed" / "data" / "dapo-math-17k.parquet", ROWS)
    write(tmp_path / "two" / "train.jsonl", ROWS)
    write(tmp_path / "two" / "dev.jsonl", ROWS[:1])
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
