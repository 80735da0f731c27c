"""How many completions a limit cuts off, and which limit would not."""

from dataclasses import replace
from pathlib import Path

import pytest
from killed_runs import SMALL

from lora_grpo.config.train_config import TrainConfig
from lora_grpo.results.scoring import Item
from lora_grpo.train import command as job
from lora_grpo.train.lengths import describe_lengths, describe_truncation

ENDED = Item("", strict=False, lenient=False, format=False, truncated=False, tokens=0)


def items(*lengths: int, never: int = 0) -> list[Item]:
    ended = [replace(ENDED, tokens=length) for length in lengths]
    return ended + [replace(ENDED, truncated=True, tokens=400)] * never


def test_the_limit_that_holds_nine_of_ten() -> None:
    ten = items(10, 20, 30, 40, 50, 60, 70, 90, 101, 300)
    assert "100 cuts off 20.0 % of 10" in describe_lengths(ten, 100, 400)
    assert "have at most 101 tokens: --max-completion-length 128" in describe_lengths(ten, 100, 400)
    assert "at most 101 tokens, which it holds" in describe_lengths(ten, 101, 400)
    endless = items(*range(10, 18), never=2)
    assert "within 400 tokens" in describe_lengths(endless, 100, 400)
    assert "at most 17 tokens" in describe_lengths(items(*range(9, 18), never=1), 100, 400)


def test_the_bases_answers_warn_only_if_more_than_a_tenth_is_cut_off() -> None:
    assert describe_truncation(items(*range(9), never=1), 100) is None
    assert "20.0 % of 10 answers before GRPO" in describe_truncation(items(*range(8), never=2), 100)


def test_a_preview_says_the_limit_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = TrainConfig(**{**SMALL, "length_preview": True, "adapters_dir": tmp_path})
    assert job.run(config, "a test") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "--max-completion-length 24 cuts off" in told and "up to 96 tokens" in told
    assert not [*tmp_path.iterdir()]
    with pytest.raises(ValueError, match="--length-preview with --resume"):
        TrainConfig(length_preview=True, resume=tmp_path)
