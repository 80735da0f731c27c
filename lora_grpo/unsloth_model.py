"""The base with a fresh adapter, loaded by Unsloth, its trainer and its vLLM on the same weights.

Read against unsloth 2026.10.6, unsloth_zoo 2026.10.6 and 2026.10.7, and vLLM 0.30.0, which needs
vllm-bnb-plugin to hold 4-bit weights; `backend.claim` has imported unsloth before. The base is the
user's own folder, quantised while it loads, NF4 with quantised scales as on the other backend: no
ready-made 4-bit copy takes its place, so that the adapter remembers the 16-bit original, and
nothing is fetched.
"""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_grpo.config import TrainConfig
from lora_grpo.model import declared_end_ids, public_name, read_config

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_SHARE, LARGEST_SHARE = 0.5, 0.95
UNSLOTH_CHOOSES = 256  # so many sequences at once mean to load_vllm that it may choose the number


def sequence_length(config: TrainConfig) -> int:
    """Return the tokens of the longest prompt with the longest completion."""
    return config.max_prompt_length + config.max_completion_length


def refuse_what_unsloth_changes(config: TrainConfig, folder: Path) -> None:
    """Raise a ValueError for a knob that Unsloth would override without a word or cannot do."""
    if config.dtype == "float32":
        raise ValueError(
            "--dtype float32: Unsloth computes in 16 bits whatever is asked for: use --backend "
            "transformers, or leave --dtype out"
        )
    if config.load_in_4bit and not config.bnb_4bit_use_double_quant:
        raise ValueError(
            "--no-bnb-4bit-use-double-quant: Unsloth always quantises the NF4 scales too: use "
            "--backend transformers, or leave the flag out"
        )
    if config.init_lora_weights == "orthogonal":
        raise ValueError(
            "--init-lora-weights orthogonal: Unsloth does not know it: use --backend transformers, "
            "or leave the flag out"
        )
    if config.dynamic_sampling:
        raise ValueError(
            "--dynamic-sampling: Unsloth lays its log-probs out by the prompts of one draw, so "
            "that several cannot be joined: use --backend transformers, or leave the flag out"
        )
    positions = read_config(folder).get_text_config().max_position_embeddings
    if sequence_length(config) > positions:
        raise ValueError(
            "--max-prompt-length + --max-completion-length come to "
            f"{sequence_length(config)}, and --model {config.model} knows {positions} positions: "
            "Unsloth would stretch them and so change the model: make them shorter"
        )


def share_of_free(share: float | None) -> float:
    """Return what Unsloth must be asked for to give vLLM a share of the whole card.

    Unsloth takes its number of what is free (unsloth_zoo's approximate_vllm_memory_usage).
    """
    import torch

    if share is None:
        return DEFAULT_SHARE
    free, total = torch.cuda.mem_get_info()
    return min(share * total / free, LARGEST_SHARE)


def engine_knobs(config: TrainConfig) -> dict[str, Any]:
    """Return what the loader is told about vLLM; in standby its share of the card stays ours."""
    if config.rollout != "vllm":
        return {"fast_inference": False}
    if config.vllm_gpu_memory_utilization is not None:
        os.environ["UNSLOTH_VLLM_STANDBY_UTIL_OVERRIDE"] = "1"
    sequences = config.vllm_max_num_seqs or config.completions_per_step
    return {
        "fast_inference": True,
        "gpu_memory_utilization": share_of_free(config.vllm_gpu_memory_utilization),
        "max_lora_rank": config.r,
        "max_num_seqs": sequences + (sequences == UNSLOTH_CHOOSES),
    }


def checkpointing(config: TrainConfig) -> str | bool:
    """Return Unsloth's own kind of gradient checkpointing, or False for none."""
    return "unsloth" if config.gradient_checkpointing else False


def engine_config(model: "PreTrainedModel") -> Any:
    """Return vLLM's own record of the model that it serves."""
    return model.vllm_engine.llm_engine.vllm_config.model_config


def check_room(model: "PreTrainedModel", config: TrainConfig) -> None:
    """Raise a ValueError where Unsloth has shortened vLLM's sequences to fit the memory."""
    if hasattr(model, "vllm_engine") and engine_config(model).max_model_len < (
        needed := sequence_length(config)
    ):
        raise ValueError(
            f"vLLM has memory for sequences of {engine_config(model).max_model_len} tokens, and "
            f"--max-prompt-length + --max-completion-length come to {needed}: raise "
            "--vllm-gpu-memory-utilization, make them shorter, or use --rollout generate"
        )


def load_unsloth_base(
    config: TrainConfig, folder: Path, tokenizer: "PreTrainedTokenizerBase"
) -> "PreTrainedModel":
    """Load the base from a local folder, with vLLM on the same weights where vllm was chosen.

    The tokenizer gets a padding token of its own where it has none: Unsloth's update takes every
    padding token for padding, so that one which also ends turns would be cut out of the prompts.

    Raises:
        ValueError: a knob that Unsloth changes, or too little memory for the sequences.
    """
    from unsloth import FastLanguageModel

    refuse_what_unsloth_changes(config, folder)
    model, patched = FastLanguageModel.from_pretrained(
        model_name=str(folder),
        max_seq_length=sequence_length(config),
        dtype=config.dtype,
        load_in_4bit=config.load_in_4bit,
        use_gradient_checkpointing=checkpointing(config),
        use_exact_model_name=True,
        local_files_only=True,
        **engine_knobs(config),
    )
    check_room(model, config)
    if patched.pad_token_id != tokenizer.pad_token_id:
        tokenizer.add_special_tokens({"pad_token": patched.pad_token})
    model.name_or_path = model.config._name_or_path = public_name(folder)
    # A model made out of vLLM's weights has not read generation_config.json.
    model.generation_config.eos_token_id = declared_end_ids(folder, tokenizer)
    return model


def add_lora(model: "PreTrainedModel", config: TrainConfig) -> "PeftModel":
    """Put a fresh adapter, kept in float32, on a base that Unsloth has loaded."""
    from unsloth import FastLanguageModel

    model = FastLanguageModel.get_peft_model(
        model,
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.target_modules),
        use_rslora=config.use_rslora,
        init_lora_weights=config.init_lora_weights,
        use_gradient_checkpointing=checkpointing(config),
        random_state=config.seed,
    )
    if hasattr(model, "load_lora"):
        keep_requests_in_scratch(model)
    return model


def keep_requests_in_scratch(model: "PeftModel") -> None:
    """Let `load_lora` write the adapter's settings to a temporary folder, not where the run stands.

    TRL's rollouts pass through the same function, by a fixed relative name.
    """
    load, folder = model.load_lora, tempfile.TemporaryDirectory(prefix="lora_grpo-")

    def load_lora(name: str, *rest: Any, **more: Any) -> Any:
        return load(str(Path(folder.name) / name), *rest, **more)

    model.load_lora = load_lora


def load_unsloth(
    config: TrainConfig, folder: Path, tokenizer: "PreTrainedTokenizerBase"
) -> "PeftModel":
    """Load the base and put a fresh adapter on it; see `load_unsloth_base`."""
    return add_lora(load_unsloth_base(config, folder, tokenizer), config)
