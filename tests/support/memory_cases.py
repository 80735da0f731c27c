"""Small models and jobs whose memory is counted."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lora_grpo.config.train_config import TrainConfig
from lora_grpo.memory.shape import read_shape
from lora_grpo.memory.terms import Job

TOKENS, ROWS = 24, 4


def job_of(folder: Path, config: TrainConfig, **more: Any) -> Job:
    given = {"backend": "transformers", "rollout": "generate", "device": "cpu", "dtype": "float32"}
    return Job(read_shape(folder), config, **given | {"prompt_length": 16} | more)


def small_config(**changed: Any) -> TrainConfig:
    sizes = {"num_generations": 4, "per_device_train_batch_size": ROWS}
    sizes["gradient_accumulation_steps"] = 2
    lengths = {"max_prompt_length": 16, "max_completion_length": TOKENS - 16}
    return TrainConfig(model="tiny", **sizes | lengths | changed)


def load(
    folder: Path, four_bit: bool, double_quant: bool = True, dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=quantised if four_bit else None
    )


def adapted(model: torch.nn.Module, targets: Sequence[str], **more: Any) -> torch.nn.Module:
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=list(targets), r=16, **more)
    return get_peft_model(model, lora)


def saved_bytes(model: torch.nn.Module, forward: Callable[[], object] | None = None) -> int:
    """Bytes of the distinct storages that a forward pass saves, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward() if forward else padded_forward(model)
    return sum(size for size, _ in seen.values())


def padded_forward(model: torch.nn.Module) -> None:
    ids = torch.randint(3, 100, (ROWS, TOKENS))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    model(input_ids=ids, attention_mask=mask, logits_to_keep=1, use_cache=False)
