"""What a vLLM engine sets aside; the engine itself is tested by `make test-vllm`."""

from pathlib import Path

import pytest

from lora_grpo.config.train_config import TrainConfig
from lora_grpo.policy.base import Placement
from lora_grpo.policy.vllm import CPU_BLOCK, allowed_rank, cache_bytes, engine_settings

CPU = Placement("cpu", "float32")


@pytest.mark.parametrize(("r", "rank"), [(1, 8), (8, 8), (9, 16), (200, 256), (512, 512)])
def test_ranks_are_rounded_up_to_one_that_vllm_has(r: int, rank: int) -> None:
    assert allowed_rank(r) == rank


def test_a_rank_beyond_vllms_is_refused() -> None:
    with pytest.raises(ValueError, match="--r 513: vLLM serves ranks of up to 512"):
        allowed_rank(513)


def test_the_engine_has_room_for_every_completion_at_its_longest() -> None:
    config = TrainConfig(max_prompt_length=100, max_completion_length=28, r=4)
    settings = engine_settings(config, CPU)
    assert (settings.max_model_len, settings.max_num_seqs) == (128, config.completions_per_step)
    assert settings.max_lora_rank == 8
    fewer = engine_settings(TrainConfig(vllm_max_num_seqs=5), CPU)
    assert fewer.max_num_seqs == 5


def test_the_cache_holds_the_keys_and_values_of_a_real_model(tiny_model_folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    settings = engine_settings(TrainConfig(max_prompt_length=100, max_completion_length=28), CPU)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    cache = model(torch.ones(1, CPU_BLOCK, dtype=torch.long), use_cache=True).past_key_values
    one = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(tiny_model_folder, settings) == one * (settings.max_num_seqs + 2)
