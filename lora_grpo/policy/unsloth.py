"""The policy of the Unsloth backend: Unsloth's vLLM completes prompts, or its own `generate` where
vLLM is not installed.

Both use the weights that are being trained. Read against unsloth 2026.10.6, TRL 1.14.2 and vLLM
0.30.0.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lora_grpo.config.train_config import TrainConfig
from lora_grpo.policy.base import declared_end_ids, merge_end_ids, public_name
from lora_grpo.policy.drawing import Sampling
from lora_grpo.policy.generate import Advance, Completion
from lora_grpo.policy.open import TransformersPolicy
from lora_grpo.policy.vllm import (
    AT_ONCE,
    PREFIX,
    abort_requests,
    check_positions,
    complete_in_chunks,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_SHARE, LARGEST_SHARE = 0.5, 0.95
UNSLOTH_CHOOSES = 256  # this many sequences at once lets load_vllm choose the number


def refuse_what_unsloth_changes(config: TrainConfig, folder: Path) -> None:
    """Raise a ValueError for a setting that Unsloth does not support, or replaces silently."""
    changes = {
        "--dtype float32: Unsloth always computes in 16 bits": config.dtype == "float32",
        "--no-bnb-4bit-use-double-quant: Unsloth always quantises the NF4 scales too": (
            config.load_in_4bit and not config.bnb_4bit_use_double_quant
        ),
        "--init-lora-weights orthogonal: Unsloth does not know it": (
            config.init_lora_weights == "orthogonal"
        ),
        "--entropy-coef: Unsloth's loss has no entropy bonus": config.entropy_coef != 0,
        "--sft-steps: Unsloth's update has no supervised step": config.sft_steps > 0,
        "--adapter with --beta: Unsloth's reference is the bare base, not the adapter": (
            config.adapter is not None and config.beta > 0
        ),
        "--dynamic-sampling: Unsloth orders its log-probs by the prompts of one draw, so that "
        "several draws cannot be joined": config.dynamic_sampling,
    }
    for reason, is_set in changes.items():
        if is_set:
            raise ValueError(f"{reason}: use --backend transformers, or leave the flag out")
    check_positions(config, folder)


def share_of_free(share: float | None) -> float:
    """Return the share of the free memory that is this share of the whole card; Unsloth counts
    from what is free (unsloth_zoo's approximate_vllm_memory_usage)."""
    import torch

    if share is None:
        return DEFAULT_SHARE
    free, total = torch.cuda.mem_get_info()
    return min(share * total / free, LARGEST_SHARE)


def engine_arguments(config: TrainConfig) -> dict[str, Any]:
    """Return the loader's arguments about vLLM."""
    if config.rollout != "vllm":
        return {"fast_inference": False}
    if config.vllm_gpu_memory_utilization is not None:
        # Without this Unsloth replaces the share when vLLM can sleep.
        os.environ["UNSLOTH_VLLM_STANDBY_UTIL_OVERRIDE"] = "1"
    sequences = config.vllm_max_num_seqs or config.completions_per_step
    return {
        "fast_inference": True,
        "gpu_memory_utilization": share_of_free(config.vllm_gpu_memory_utilization),
        "max_lora_rank": config.r,
        "max_num_seqs": sequences + (sequences == UNSLOTH_CHOOSES),
    }


def engine_config(model: "PreTrainedModel") -> Any:
    """Return vLLM's own record of the model that it serves."""
    return model.vllm_engine.llm_engine.vllm_config.model_config


def check_room(model: "PreTrainedModel", config: TrainConfig) -> None:
    """Raise a ValueError where Unsloth has shortened vLLM's sequences to fit the memory."""
    if not hasattr(model, "vllm_engine"):
        return
    room, needed = engine_config(model).max_model_len, config.max_sequence_length
    if room < needed:
        raise ValueError(
            f"vLLM has memory for sequences of {room} tokens, and --max-prompt-length + "
            f"--max-completion-length come to {needed}: raise --vllm-gpu-memory-utilization, make "
            "them shorter, or use --rollout generate"
        )


def load_unsloth(
    config: TrainConfig, folder: Path, tokenizer: "PreTrainedTokenizerBase"
) -> "PeftModel":
    """Load the base from a local folder, with vLLM on the same weights if it samples, and put a
    fresh float32 adapter on it.

    The tokenizer gets a padding token of its own if it has none: Unsloth's update masks every
    padding token, so one that also ends turns would be masked inside the prompts.

    Raises:
        ValueError: there is too little memory for the sequences.
    """
    from unsloth import FastLanguageModel

    checkpointing = "unsloth" if config.gradient_checkpointing else False
    model, patched = FastLanguageModel.from_pretrained(
        model_name=str(folder),
        max_seq_length=config.max_sequence_length,
        dtype=config.dtype,
        load_in_4bit=config.load_in_4bit,
        use_gradient_checkpointing=checkpointing,
        use_exact_model_name=True,
        local_files_only=True,
        **engine_arguments(config),
    )
    check_room(model, config)
    if patched.pad_token_id != tokenizer.pad_token_id:
        tokenizer.add_special_tokens({"pad_token": patched.pad_token})
    model.name_or_path = model.config._name_or_path = public_name(folder)
    # A model made out of vLLM's weights has not read generation_config.json.
    model.generation_config.eos_token_id = declared_end_ids(folder, tokenizer)
    model = FastLanguageModel.get_peft_model(
        model,
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.target_modules),
        use_rslora=config.use_rslora,
        init_lora_weights=config.init_lora_weights,
        use_gradient_checkpointing=checkpointing,
        random_state=config.seed,
    )
    if hasattr(model, "load_lora"):
        keep_requests_in_scratch(model)
    return model


def keep_requests_in_scratch(model: "PeftModel") -> None:
    """Let `load_lora`, which TRL's rollouts call with a relative name, write to a temporary folder
    and not to the current one."""
    load, folder = model.load_lora, TemporaryDirectory(prefix=PREFIX)

    def load_lora(name: str, *rest: Any, **more: Any) -> Any:
        return load(str(Path(folder.name) / name), *rest, **more)

    model.load_lora = load_lora


class UnslothPolicy(TransformersPolicy):
    """A base with its adapter; prompts are completed by the base alone until `follow`."""

    adapted = False

    def complete(
        self,
        prompts: list[str],
        max_completion_length: int,
        advance: Advance = lambda count: None,
        sampling: Sampling | None = None,
    ) -> list[Completion]:
        asked = (prompts, max_completion_length, advance, sampling)
        if hasattr(self.model, "vllm_engine"):
            return self._complete_with_vllm(*asked)
        was_training = self.model.training
        self.model.for_inference()
        try:
            with nullcontext() if self.adapted else self.model.disable_adapter():
                return super().complete(*asked)
        finally:
            if was_training:
                self.model.for_training()

    def _complete_with_vllm(
        self,
        prompts: list[str],
        max_completion_length: int,
        advance: Advance,
        sampling: Sampling | None,
    ) -> list[Completion]:
        engine = self.model.vllm_engine
        end_ids = merge_end_ids(self.tokenizer, self.model.generation_config.eos_token_id)
        request = self.model.load_lora("evaluation", load_tensors=True) if self.adapted else None
        chunk = AT_ONCE * engine.approx_max_num_seqs

        def generate(ids: list[list[int]], params: Any) -> list[Any]:
            return engine.generate(
                [{"prompt_token_ids": row} for row in ids],
                sampling_params=params,
                lora_request=request,
                use_tqdm=False,
            )

        try:
            return complete_in_chunks(
                self.tokenizer,
                prompts,
                end_ids,
                max_completion_length,
                chunk,
                generate,
                advance,
                sampling,
            )
        finally:
            if engine_config(self.model).enable_sleep_mode:
                engine.sleep(level=1)  # `generate` wakes it

    def follow(self, model: "PeftModel") -> None:
        self.model, self.adapted = model, True

    def abort(self) -> None:
        if hasattr(self.model, "vllm_engine"):
            abort_requests(self.model.vllm_engine)

    def close(self) -> None:
        """Free vLLM's memory; the model shares it, so neither can be used afterwards."""
        engine, holder = getattr(self.model, "vllm_engine", None), self.model
        if engine is None:
            return
        from unsloth_zoo.vllm_utils import delete_vllm

        while holder is not None:
            for name in ("vllm_engine", "fast_generate", "fast_generate_batches", "load_lora"):
                vars(holder).pop(name, None)
            holder = getattr(holder, "model", None)
        # An error here must not hide the run's own result.
        with suppress(Exception):
            delete_vllm(engine)


@contextmanager
def open_unsloth(
    config: TrainConfig, folder: Path, tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[UnslothPolicy]:
    """Open the base with a fresh adapter for the block, and end vLLM however the block ends."""
    model = load_unsloth(config, folder, tokenizer)
    policy = UnslothPolicy(model, tokenizer, config.eval_batch_size)
    try:
        yield policy
    finally:
        policy.close()
