"""The policy on the Unsloth backend: its vLLM answers, or its own generate where there is no vLLM.

Both see the weights that the trainer trains, the adapter as it is at that moment. Read against
unsloth 2026.10.6, TRL 1.14.2 and vLLM 0.30.0.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_grpo.config.train_config import TrainConfig
from lora_grpo.policy.base import declared_end_ids, end_of_turn_ids, public_name, read_config
from lora_grpo.policy.generate import Advance, Completion, complete

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_SHARE, LARGEST_SHARE = 0.5, 0.95
UNSLOTH_CHOOSES = 256  # this many sequences at once lets load_vllm choose the number


def sequence_length(config: TrainConfig) -> int:
    """Return the tokens of the longest prompt with the longest completion."""
    return config.max_prompt_length + config.max_completion_length


def refuse_what_unsloth_changes(config: TrainConfig, folder: Path) -> None:
    """Raise a ValueError for a setting that Unsloth would override without a word or cannot do."""
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


def engine_arguments(config: TrainConfig) -> dict[str, Any]:
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
        ValueError: a setting that Unsloth changes, or too little memory for the sequences.
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
        **engine_arguments(config),
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


WEIGHTS = "adapter_model.safetensors"


class UnslothPolicy:
    """A base with its adapter: the base answers alone until `follow` or `use_adapter`."""

    def __init__(
        self, model: "PeftModel", tokenizer: "PreTrainedTokenizerBase", batch_size: int
    ) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.adapted = False

    def complete(
        self, prompts: list[str], max_completion_length: int, advance: Advance = lambda count: None
    ) -> list[Completion]:
        """Answer each rendered prompt greedily, in their order, with the adapter as it is now."""
        if hasattr(self.model, "vllm_engine"):
            return self._complete_with_vllm(prompts, max_completion_length, advance)
        was_training = self.model.training
        self.model.for_inference()
        try:
            with nullcontext() if self.adapted else self.model.disable_adapter():
                return complete(
                    self.model,
                    self.tokenizer,
                    prompts,
                    max_completion_length,
                    self.batch_size,
                    advance,
                )
        finally:
            if was_training:
                self.model.for_training()

    def _complete_with_vllm(
        self, prompts: list[str], max_completion_length: int, advance: Advance
    ) -> list[Completion]:
        from lora_grpo.policy.vllm import AT_ONCE, complete_in_chunks

        engine, end_ids = self.model.vllm_engine, end_of_turn_ids(self.model, self.tokenizer)
        request = self.model.load_lora("evaluation", load_tensors=True) if self.adapted else None
        chunk = AT_ONCE * engine.approx_max_num_seqs

        def generate(ids: list[list[int]], params: Any) -> list[Any]:
            return engine.generate(
                [{"prompt_token_ids": row} for row in ids],
                sampling_params=params,
                lora_request=request,
                use_tqdm=False,
            )

        with self._asleep_afterwards():
            return complete_in_chunks(
                self.tokenizer, prompts, end_ids, max_completion_length, chunk, generate, advance
            )

    @contextmanager
    def _asleep_afterwards(self) -> Iterator[None]:
        """Give the cache's memory back after the block; `generate` itself wakes the engine."""
        try:
            yield
        finally:
            if engine_config(self.model).enable_sleep_mode:
                self.model.vllm_engine.sleep(level=1)

    def use_adapter(self, directory: Path) -> None:
        """Answer with this adapter on the base from now on."""
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        set_peft_model_state_dict(self.model, load_file(directory / WEIGHTS))
        self.adapted = True

    def follow(self, model: "PeftModel") -> None:
        """Answer as the adapter in training is at each moment."""
        self.model, self.adapted = model, True

    def abort(self) -> None:
        """Forget what vLLM was generating when an error came."""
        if hasattr(self.model, "vllm_engine"):
            engine = self.model.vllm_engine.llm_engine
            engine.abort_request(list(engine.output_processor.request_states), internal=True)

    def close(self) -> None:
        """Give vLLM's memory back; the model shares it, so neither can be used afterwards."""
        engine, holder = getattr(self.model, "vllm_engine", None), self.model
        if engine is None:
            return
        from unsloth_zoo.vllm_utils import delete_vllm

        while holder is not None:
            for name in ("vllm_engine", "fast_generate", "fast_generate_batches", "load_lora"):
                vars(holder).pop(name, None)
            holder = getattr(holder, "model", None)
        # What a run has found out must not be lost to the way that its engine ends.
        with suppress(Exception):
            delete_vllm(engine)


@contextmanager
def open_unsloth(
    config: TrainConfig, folder: Path, tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[UnslothPolicy]:
    """Hold the base and a fresh adapter while the block runs, and end vLLM however it ends."""
    model = load_unsloth(config, folder, tokenizer)
    policy = UnslothPolicy(model, tokenizer, config.eval_batch_size)
    try:
        yield policy
    finally:
        policy.close()
