"""TRL's `GRPOTrainer` for a LoRA adapter: an update without repeated work, exact resume, per-step
figures, and recovery from running out of memory. The mathematics is TRL's.
"""

import inspect
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import split_tensor_dict

from lora_grpo.grpo.batch import Batch, StepState
from lora_grpo.grpo.groups import (
    Draw,
    Replacements,
    arrange,
    fill_with_signal,
    normalise_in_groups,
    silence_dead_groups,
)
from lora_grpo.grpo.packed_update import computing_packed, packed_scores
from lora_grpo.grpo.self_test import why_not_packed
from lora_grpo.machine.allocator import giving_back
from lora_grpo.machine.out_of_memory import UPDATE, RowLimit, release_memory
from lora_grpo.policy.checkpoints import WholeCheckpoints
from lora_grpo.policy.layers import one_matrix
from lora_grpo.policy.sampling import sample
from lora_grpo.rewards.builtin import Reward, left_out
from lora_grpo.tasks.task import NUMBER_TASK, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Unsloth replaces TRL's class while it is imported, and has its own way to compute log-probs.
BY_UNSLOTH = GRPOTrainer.__name__ == "UnslothGRPOTrainer"


class LoraGRPOTrainer(WholeCheckpoints, GRPOTrainer):
    """TRL's trainer for one adapter. A step, in the order of time:

     1. `training_step` gets the step's first micro-batch of prompts and calls `_prepare_inputs`,
        where TRL samples for the whole step: `_generate_and_score_completions`.
     2. `_generate_single_turn` samples G completions per prompt, fewer at once if memory runs out.
     3. `_calculate_rewards` scores them and keeps them as `self.step.batch`.
     4. TRL computes log-probs of the old and the reference policy, where they are needed
        (`_get_per_token_logps_and_entropies`), and the advantages (reward - mean) / std per group.
     5. Groups whose rewards are all equal get advantages of exactly 0; dynamic sampling replaces
        them with groups of other prompts (steps 2 to 4 again).
     6. `_prepare_inputs` deals the rows to micro-batches so that one prompt's rows are together.
     7. `training_step` makes one micro-batch's backward pass: TRL's `compute_loss` asks
        `_get_per_token_logps_and_entropies` for the policy's log-probs, packed, of live rows only.
     8. After the last micro-batch transformers clips the gradient and updates the adapter.
     9. `_save_checkpoint`, where one is due, writes a whole checkpoint or none.

    Every method that begins with one underscore overrides a method of TRL's or transformers'.
    `packed` says whether steps 2 and 7 compute each prompt once, or are TRL's own.
    """

    packed = False

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        rewards: Sequence[Reward],
        args: GRPOConfig,
        peft_config: LoraConfig | None,
        train_dataset: Dataset,
        say: Callable[[str], None] = print,
        shared_prefix: bool = True,
        replacements: Replacements | None = None,
        columns: Mapping[int, dict[str, Any]] | None = None,
        prefill: str = "",
        task: Task = NUMBER_TASK,
    ) -> None:
        check_overrides(GRPOTrainer)
        torch.manual_seed(args.seed)
        super().__init__(
            model=model,
            reward_funcs=[reward.function for reward in rewards],
            args=args,
            train_dataset=train_dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        self.step = StepState()
        self.replacements, self.columns = replacements, columns
        self.prefill, self.task = prefill, task
        self.reward_func_names = [reward.name for reward in rewards]
        self.rewards, self.say = rewards, say
        self.abort_generation: Callable[[], None] = lambda: None
        self.generation_rows = RowLimit(
            "generation", say, self.release_generation, "as many completions are drawn"
        )
        self.scoring_rows = RowLimit("scoring", say)
        self.update_rows = RowLimit(UPDATE, say)
        # TRL casts the adapter of a 4-bit base to bfloat16, whose 8 bits lose updates as small as
        # LoRA's.
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in self.trained:
            parameter.data = parameter.data.float()
        if shared_prefix and not BY_UNSLOTH:
            reason = why_not_packed(self)
            self.packed = reason is None
            if reason:
                say(f"the update repeats each prompt for every completion, as TRL does: {reason}")

    def inner_model(self) -> torch.nn.Module:
        """Return the model that holds the adapter, without PEFT's wrapper."""
        return self.model.get_base_model()

    @property
    def learns_from_all(self) -> bool:
        """Whether completions without an advantage have a gradient too: of the KL term, or of the
        entropy bonus."""
        return self.beta != 0 or self.entropy_coef != 0

    # Sampling

    def _generate(self, prompts: list) -> tuple:
        started, synced = time.perf_counter(), self.step.seconds["sync"]
        try:
            with one_matrix(self.model):
                generated = super()._generate(prompts)
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise FloatingPointError("the policy's probabilities are not finite") from error
        synced = self.step.seconds["sync"] - synced
        self.step.seconds["generate"] += time.perf_counter() - started - synced
        return generated

    def _generate_single_turn(self, prompt_ids: list[list[int]], *rest: Any, **more: Any) -> tuple:
        turn = super()._generate_single_turn

        def generate(rows: int) -> tuple[list[list[int]], list[list[float]] | None]:
            parts = []
            for start in range(0, len(prompt_ids), rows):
                part = prompt_ids[start : start + rows]
                if self.packed and not self.use_vllm:
                    parts.append((self.sample_packed(part), None))
                else:
                    parts.append(turn(part, *rest, **more))
            ids, logprobs = zip(*parts, strict=True)
            whole = None if logprobs[0] is None else list(chain(*logprobs))
            return list(chain(*ids)), whole

        return self.generation_rows.run(generate, len(prompt_ids))

    def sample_packed(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """Return a completion of each prompt, sampled by the model itself."""
        was_training = self.model.training
        self.model.eval()  # without gradient checkpointing, which keeps no cache
        try:
            with self.accelerator.autocast():
                settings = (self.generation_config, self.eos_token_ids, self.max_completion_length)
                return sample(self.inner_model(), prompt_ids, *settings)
        finally:
            self.model.train(was_training)

    def release_generation(self) -> None:
        """Free what sampling held when memory ran out."""
        self.abort_generation()
        # Unsloth sets this while it scores, and unsets it only if nothing fails.
        os.environ.pop("UNSLOTH_RETURN_HIDDEN_STATES", None)
        release_memory()

    # Rewards and advantages

    def _calculate_rewards(
        self,
        inputs: list[dict[str, Any]],
        prompts: list,
        completions: list,
        completion_ids_list: list[list[int]],
    ) -> torch.Tensor:
        started = time.perf_counter()
        columns = [self.columns[row["row"]] for row in inputs] if self.columns else inputs
        # As in evaluation: the whole text with the chat template's beginning, not what TRL parsed.
        texts = self._tokenizer.batch_decode(completion_ids_list, skip_special_tokens=True)
        texts = [self.prefill + text for text in texts]
        completions = [[{"role": "assistant", "content": text}] for text in texts]
        scores = super()._calculate_rewards(columns, prompts, completions, completion_ids_list)
        # TRL would count what is missing as 0 beside the other rewards; a completion without any
        # score it leaves out of its group.
        rows, notes = left_out(self.rewards, len(texts))
        scores[list(rows)] = math.nan
        for note in notes:
            self.say(f"step {self.state.global_step + 1}: {note}")
        weighted = scores * self.reward_weights.to(scores.device)  # (B, rewards)
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        self.step.batch = Batch(
            questions=[row["question"] for row in inputs],
            answers=[row["answer"] for row in inputs],
            completions=texts,
            tokens=[len(ids) for ids in completion_ids_list],
            truncated=[ids[-1] not in ends for ids in completion_ids_list],
            rewards={
                name: [None if math.isnan(value) else value for value in values]
                for name, values in zip(self.reward_func_names, weighted.T.tolist(), strict=True)
            },
            verdicts=[
                self.task.judge(text, row["answer"], row)
                for text, row in zip(texts, columns, strict=True)
            ],
            normalised=normalise_in_groups(scores, self.reward_weights, self.num_generations)
            if self.multi_objective_aggregation == "normalize_then_sum"
            else None,
        )
        self.step.seconds["reward"] += time.perf_counter() - started
        return scores

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        generate_and_score = super()._generate_and_score_completions

        def draw(rows: list[dict[str, Any]]) -> Draw:
            output = generate_and_score(rows)
            batch = self.step.batch
            output["advantages"] = silence_dead_groups(
                output["advantages"], batch.compared(), self.num_generations
            )
            self.log_clipped(output)
            return Draw(output, batch)

        drawn = draw(inputs)
        if self.replacements:
            drawn = fill_with_signal(
                drawn,
                draw,
                self.replacements,
                self.state.global_step,
                self.num_generations,
                self._tokenizer.pad_token_id,
            )
            self.step.batch = drawn.batch
            for name, found in self._metrics["train"].items():
                if name.endswith("/max"):  # TRL would log the mean of the draws' maxima
                    found[:] = [max(found)]
        return drawn.output

    def log_clipped(self, output: dict[str, Any]) -> None:
        """Log the share of tokens whose ratio to the sampler's log-probs was clipped or masked."""
        ratio, cap = output.get("importance_sampling_ratio"), self.vllm_importance_sampling_clip_max
        if ratio is not None:  # (B, T), or (B, 1) for whole sequences
            mask = output["completion_mask"].bool()
            clipped = ((ratio == 0) | (ratio >= cap)) & mask
            share = (clipped.sum() / mask.sum().clamp(min=1)).item()
            self._metrics["train"]["sampling/importance_sampling_ratio/clipped"].append(share)

    # Update

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if generation_batch is self.step.part:
            return generation_batch
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        of_one_step = self.args.steps_per_generation == self.args.gradient_accumulation_steps
        if not self.packed or not of_one_step or self._buffered_inputs is before:
            return inputs
        self._buffered_inputs = arrange(self._buffered_inputs, self.learns_from_all)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def training_step(self, model: torch.nn.Module, inputs: Any, *rest: Any) -> torch.Tensor:
        # As transformers does before it prepares inputs: in evaluation mode bitsandbytes packs
        # 4-bit weights for some CPUs as no backward pass can read them.
        model.train()
        micro_batch, started = self._prepare_inputs(inputs), time.perf_counter()
        with computing_packed(self.inner_model()) if self.packed else nullcontext():
            loss = self.repeatable_step(model, micro_batch, *rest)
        self.step.seconds["update"] += time.perf_counter() - started
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss.item()}")
        return loss

    def repeatable_step(
        self, model: torch.nn.Module, micro_batch: dict[str, Any], *rest: Any
    ) -> torch.Tensor:
        """Make a micro-batch's backward pass in as few parts as fit into memory; a failed attempt
        adds nothing to the gradient."""
        earlier = [parameter.grad for parameter in self.trained]
        step = super().training_step

        def update(rows: int) -> torch.Tensor:
            for parameter in self.trained:
                parameter.grad = None
            losses, parts = [], len(micro_batch["completion_ids"]) // rows
            with self.smaller_micro_batch(parts):
                for self.step.part in split_tensor_dict(micro_batch, parts):
                    losses.append(step(model, self.step.part, *rest))
            return torch.stack(losses).sum()

        with giving_back(self.model.config.get_text_config().hidden_size, self.model.device.type):
            whole = len(micro_batch["completion_ids"])
            # bnpo divides by the tokens of one pass, and the experts' auxiliary loss is of one
            # pass: with fewer rows it would be another loss.
            least = whole if self.loss_type == "bnpo" or self.aux_loss_enabled else 1
            loss = self.update_rows.run(update, whole, at_least=least)
        for parameter, gradient in zip(self.trained, earlier, strict=True):
            if gradient is not None:
                new = parameter.grad  # None for an expert that got no token
                parameter.grad = gradient if new is None else gradient.add_(new)
        return loss

    @contextmanager
    def smaller_micro_batch(self, parts: int) -> Iterator[None]:
        """Let TRL weight each of `parts` as if the micro-batch had always been that small."""
        step, accumulation = self._step, self.current_gradient_accumulation_steps
        per_generation = self.args.steps_per_generation
        self.current_gradient_accumulation_steps = accumulation * parts
        self.args.steps_per_generation = per_generation * parts
        try:
            yield
            step += 1
        finally:
            self.step.part, self._step = None, step
            self.current_gradient_accumulation_steps = accumulation
            self.args.steps_per_generation = per_generation

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *rest: Any, **more: Any):
        self.step.inputs = inputs
        if not BY_UNSLOTH and self.entropy_coef != 0:
            # TRL divides by the micro-batch's tokens, so that its bonus depends on their share.
            tokens = inputs["num_items_in_batch"].clamp(min=1) / self.args.steps_per_generation
            self.step.entropy_weight = inputs["completion_mask"].sum() / tokens
        try:
            return super().compute_loss(model, inputs, *rest, **more)
        finally:
            self.step.inputs = None

    def _get_per_token_logps_and_entropies(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        *rest: Any,
        **more: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        trl_s_own = super()._get_per_token_logps_and_entropies
        if BY_UNSLOTH:
            batch = (input_ids, attention_mask, logits_to_keep, batch_size)
            return trl_s_own(model, *batch, *rest, **more)
        is_policy = self.accelerator.unwrap_model(model) is self.model

        def score(rows: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
            batch = (input_ids, attention_mask, logits_to_keep)
            if self.packed and is_policy:
                return (*packed_scores(self, *batch, rows), None)
            return trl_s_own(model, *batch, batch_size=rows, **more)

        if self.step.inputs is not None:
            logps, entropies, auxiliary = score(len(input_ids))
            return logps, entropies * self.step.entropy_weight, auxiliary
        return self.scoring_rows.run(score, len(input_ids), batch_size)


def check_overrides(trainer_class: type) -> None:
    """Refuse a TRL that would never call one of this trainer's methods.

    Raises:
        RuntimeError: it has no method of that name to override.
    """
    methods = [name for name, value in vars(LoraGRPOTrainer).items() if inspect.isfunction(value)]
    gone = [name for name in methods if name[0] == "_" and not hasattr(trainer_class, name)]
    if gone:
        raise RuntimeError(
            f"trl {trl.__version__} has no {', '.join(gone)}, which this trainer overrides: "
            "install trl==1.14.2"
        )
