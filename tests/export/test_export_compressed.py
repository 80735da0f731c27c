"""compressed-tensors without llm-compressor: group sizes and calibration rows."""

import json
from pathlib import Path

import pytest
from merge_models import make_base

from lora_grpo.data.prompt import PLAIN
from lora_grpo.export.compressed import choose_group, find_calibration
from lora_grpo.export.source import Source
from lora_grpo.machine.files import write_jsonl
from lora_grpo.policy.adapter import read_record
from lora_grpo.policy.base import load_tokenizer


@pytest.mark.parametrize(
    ("config", "group"),
    [
        ({"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14}, 128),
        ({"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}, 64),
        (
            {
                "hidden_size": 128,
                "intermediate_size": 384,
                "num_attention_heads": 3,
                "head_dim": 32,
            },
            32,
        ),
    ],
)
def test_groups_divide_every_row(config: dict, group: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert choose_group(tmp_path) == group


def test_rows_without_a_group_are_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 40, "intermediate_size": 128, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    with pytest.raises(ValueError, match="--format w4a16 takes rows in groups of 128, 64, 32"):
        choose_group(tmp_path)


def source_of(records: Path) -> Source:
    return Source("run", make_base(), make_base(), read_record(records), PLAIN)


def test_calibration_takes_the_last_sample_of_each_prompt(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_base())
    told = [("a?", "old", False), ("b?", "cut", True), ("a?", "new", False)]
    rows = [{"question": q, "completion": c, "truncated": t} for q, c, t in told]
    write_jsonl(tmp_path / "completions.jsonl", rows)
    rows, origin = find_calibration(source_of(tmp_path), None, tokenizer)
    first, second = (tokenizer.decode(row) for row in rows)
    assert first.endswith(f"new{tokenizer.eos_token}") and "a?" in first and "old" not in first
    assert second.endswith("cut") and "2 prompts of the run" in origin
