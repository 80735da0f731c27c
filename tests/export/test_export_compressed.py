"""compressed-tensors without llm-compressor: group sizes, reading codes, calibration rows."""

import json
from pathlib import Path

import pytest
import torch
from merge_models import make_base
from safetensors.torch import load_file, save_file

from lora_grpo.data.prompt import PLAIN
from lora_grpo.export.calibration import check_layers, find_calibration, pad
from lora_grpo.export.compressed_format import choose_group, read_stored, unpack
from lora_grpo.export.source import Source
from lora_grpo.machine.files import write_jsonl
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


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Return eight codes of -8 to 7 as an int32, by shifting Python's own integers."""
    words = [
        [sum((code + 8) << 4 * place for place, code in enumerate(row[at : at + 8])) for at in at8]
        for row in codes.tolist()
        for at8 in [range(0, codes.shape[1], 8)]
    ]
    return torch.tensor(words).to(torch.int32)


def test_codes_are_read_as_the_format_packs_them(tmp_path: Path) -> None:
    codes = torch.randint(-8, 8, (4, 64))
    scale = torch.rand(4, 2).bfloat16()
    tensors = {"w_packed": pack(codes), "w_scale": scale}
    save_file(tensors, tmp_path / "model.safetensors")
    found = unpack(read_stored(tmp_path), "w", codes.shape)
    assert found.codes.flatten(1).equal(codes.float())
    assert found.values.equal(codes.view(4, 2, 32) * scale.float()[..., None])


def source_of(records: Path) -> Source:
    return Source("run", make_base(), None, records, PLAIN)


def test_calibration_takes_the_last_sample_of_each_prompt(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_base())
    told = [("a?", "old", False), ("b?", "cut", True), ("a?", "new", False)]
    rows = [{"question": q, "completion": c, "truncated": t} for q, c, t in told]
    write_jsonl(tmp_path / "completions.jsonl", rows)
    found = find_calibration(source_of(tmp_path), None, tokenizer)
    first, second = (tokenizer.decode(row) for row in found.rows)
    assert first.endswith(f"new{tokenizer.eos_token}") and "a?" in first and "old" not in first
    assert second.endswith("cut") and "2 prompts of the run" in found.origin


def test_padding_changes_no_row() -> None:
    ids, mask = pad([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_codes_worse_than_rounding_to_nearest_fail(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    weight = load_file(make_base() / "model.safetensors")[name].float().view(64, 4, 32)
    scale = weight.abs().amax(-1) / 7.5
    codes = (weight / scale[..., None]).round().clamp(-8, 7).flatten(1).long()
    codes[0] = codes[0].roll(1)
    save_file({f"{name}_packed": pack(codes), f"{name}_scale": scale}, tmp_path / "m.safetensors")
    check = check_layers(make_base(), read_stored(tmp_path), [[5, 9, 17, 30], [4, 8]])
    assert not check.passed and name in check.detail
