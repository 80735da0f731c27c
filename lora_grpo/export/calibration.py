"""What GPTQ calibrates 4-bit weights on, and the proof that this left the layers nearer to the
merged model's than rounding each weight to nearest would have.

The run's own training prompts with the completions that its policy sampled last; where these are
not on record, built-in problems and the merged model's greedy answers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_grpo.data.arithmetic import generate_problems
from lora_grpo.export.compressed_format import Stored, is_packed, unpack
from lora_grpo.export.source import Source
from lora_grpo.machine.files import read_jsonl
from lora_grpo.policy.adapter import COMPLETIONS
from lora_grpo.proof.checks import Check
from lora_grpo.proof.distance import continue_greedily
from lora_grpo.proof.reference import render_question

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUM_ROWS, NUM_COMPARED, MAX_NEW_TOKENS = 128, 32, 64


@dataclass(frozen=True)
class Calibration:
    """Token sequences, each a prompt and its completion, and where they come from."""

    rows: list[list[int]]
    origin: str


def find_calibration(
    source: Source, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
) -> Calibration:
    """Return up to 128 sequences of the run; `model` is the merged one and answers in its place."""
    sampled = {row["question"]: row for row in read_jsonl(source.records / COMPLETIONS)}
    if not sampled:
        problems = generate_problems(NUM_ROWS, "train")
        prompts = [render_question(tokenizer, row["question"], source.style) for row in problems]
        rows = continue_greedily(model, tokenizer, prompts, MAX_NEW_TOKENS)
        return Calibration(rows, f"{len(rows)} built-in problems, answered by the merged model")
    texts = [
        render_question(tokenizer, question, source.style)
        + row["completion"].removeprefix(source.style.prefill)
        + ("" if row["truncated"] else tokenizer.eos_token)
        for question, row in list(sampled.items())[-NUM_ROWS:]
    ]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return Calibration(rows, f"{len(rows)} prompts of the run with its last samples")


def load_rows(rows: list[list[int]]) -> "DataLoader":
    """Return what llm-compressor takes: a sequence a step."""
    from torch.utils.data import DataLoader

    batches = [{"input_ids": ids, "attention_mask": mask} for ids, mask in map(pad, zip(rows))]
    return DataLoader(batches, batch_size=None)


def pad(rows: "list[list[int]] | tuple[list[int], ...]") -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, (B, T), padded on the right, where a causal model never looks back."""
    mask = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for index, row in enumerate(rows):
        mask[index, : len(row)] = 1
    ids = torch.zeros_like(mask)
    ids[mask.bool()] = torch.tensor([token for row in rows for token in row])
    return ids, mask


@torch.no_grad()
def check_layers(merged: Path, stored: Stored, rows: list[list[int]]) -> Check:
    """Compare each layer's output error on calibration rows with that of rounding to nearest.

    GPTQ (Frantar et al. 2023, arXiv 2210.17323) minimises just this: |(W' - W) X|^2. Both use the
    stored scales; X is what the merged model puts into the layer.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        merged, dtype=torch.float32, trust_remote_code=False
    ).eval()
    ids, mask = pad(rows[:NUM_COMPARED])
    ratios: dict[str, float] = {}

    def compare(name: str, weight: torch.Tensor, inputs: torch.Tensor) -> None:
        packed = unpack(stored, name, weight.shape)
        grouped = weight.unflatten(1, packed.codes.shape[1:])
        nearest = (grouped / packed.scale[..., None]).round().clamp(-8, 7) * packed.scale[..., None]
        gptq, rounded = (
            ((values - grouped).flatten(1) @ inputs.T).square().sum()
            for values in (packed.values, nearest)
        )
        ratios[name] = (gptq / rounded).item()

    for module_name, module in model.named_modules():
        if is_packed(stored, f"{module_name}.weight"):
            module.register_forward_pre_hook(
                lambda layer, given, name=f"{module_name}.weight": compare(
                    name, layer.weight, given[0][mask.bool()]
                )
            )
    model(input_ids=ids, attention_mask=mask)
    worse = [f"{name} is {ratio:.3g} times" for name, ratio in ratios.items() if not ratio < 1]
    detail = (
        f"{'; '.join(worse[:3])} as far off as rounding to nearest"
        if worse
        else f"output errors are {min(ratios.values()):.2f} to {max(ratios.values()):.2f} of those "
        f"of rounding to nearest, in {len(ratios)} layers"
    )
    return Check("calibration", not worse, detail)
