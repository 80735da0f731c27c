"""The policy on the Unsloth backend: its vLLM answers, or its own generate where there is no vLLM.

Both see the weights that the trainer trains, the adapter as it is at that moment. Read against
unsloth 2026.10.6, TRL 1.14.2 and vLLM 0.30.0.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lora_grpo.config import TrainConfig
from lora_grpo.model import end_of_turn_ids
from lora_grpo.rollout import Advance, Completion, complete, cut_at_end
from lora_grpo.unsloth_model import engine_config, load_unsloth

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase, Trainer

AT_ONCE = 4
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
        from vllm import SamplingParams

        engine, end_ids = self.model.vllm_engine, end_of_turn_ids(self.model, self.tokenizer)
        settings = SamplingParams(
            temperature=0.0,
            max_tokens=max_completion_length,
            stop_token_ids=end_ids,
            detokenize=False,
        )
        request = self.model.load_lora("evaluation", load_tensors=True) if self.adapted else None
        ids = self.tokenizer(prompts, add_special_tokens=False)["input_ids"]
        completions, chunk = [], AT_ONCE * engine.approx_max_num_seqs
        with self._asleep_afterwards():
            for start in range(0, len(ids), chunk):
                part = [{"prompt_token_ids": row} for row in ids[start : start + chunk]]
                answers = engine.generate(
                    part, sampling_params=settings, lora_request=request, use_tqdm=False
                )
                for answer in answers:
                    row, truncated = cut_at_end(list(answer.outputs[0].token_ids), end_ids)
                    text = self.tokenizer.decode(row, skip_special_tokens=True)
                    completions.append(Completion(text, len(row), truncated))
                advance(len(part))
        return completions

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

    def follow(self, trainer: "Trainer") -> None:
        """Answer as the trainer's adapter is at each moment; its rollouts use the engine as is."""
        self.model, self.adapted = trainer.model, True
        trainer.abort_generation = self.abort

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
