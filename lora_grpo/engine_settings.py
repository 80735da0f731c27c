"""What a vLLM engine sets aside for a run, and how much that is on a CPU."""

import math
from dataclasses import dataclass
from pathlib import Path

from lora_grpo.config import TrainConfig
from lora_grpo.model import Placement, read_config

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
CPU_BLOCK = 128  # tokens of a page of the cache


@dataclass(frozen=True)
class EngineSettings:
    """What the engine sets aside: tokens a sequence, sequences at once, and the memory for them."""

    placement: Placement
    max_model_len: int
    max_num_seqs: int
    max_lora_rank: int
    load_in_4bit: bool
    gpu_memory_utilization: float | None = None
    seed: int = 0


def engine_settings(config: TrainConfig, placement: Placement) -> EngineSettings:
    """Return the engine of a training run, in the share of the card that the plan gave it."""
    return EngineSettings(
        placement=placement,
        max_model_len=config.max_prompt_length + config.max_completion_length,
        max_num_seqs=config.vllm_max_num_seqs or config.completions_per_step,
        max_lora_rank=allowed_rank(config.r),
        load_in_4bit=config.load_in_4bit,
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        seed=config.seed,
    )


def allowed_rank(r: int) -> int:
    """Return the smallest rank that vLLM sets aside for adapters of rank `r`.

    Raises:
        ValueError: it has none that large.
    """
    for rank in RANKS:
        if r <= rank:
            return rank
    raise ValueError(f"--r {r}: vLLM serves ranks of up to {RANKS[-1]}; use --rollout generate")


def check_positions(config: TrainConfig, folder: Path) -> None:
    """Raise a ValueError where prompt and completion together are longer than the model can see."""
    known = read_config(folder).get_text_config().max_position_embeddings
    needed = config.max_prompt_length + config.max_completion_length
    if needed > known:
        raise ValueError(
            f"--max-prompt-length + --max-completion-length come to {needed}, and --model "
            f"{config.model} knows {known} positions: make them shorter"
        )


def cache_bytes(folder: Path, settings: EngineSettings) -> int:
    """Return the float32 KV cache that every sequence at full length needs, in bytes."""
    config = read_config(folder).get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * head * 4
    blocks = math.ceil(settings.max_model_len / CPU_BLOCK) * settings.max_num_seqs + 2
    return token * blocks * CPU_BLOCK
