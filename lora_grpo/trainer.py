"""The GRPO update: TRL's `GRPOTrainer` on the adapter alone, made exact to resume, open to look
into, and not ended by running out of memory.

Each method that is overridden stands in `seams` with its reason and TRL's version; the ones that
save work are in `packed_trainer`. The mathematics is TRL's.
"""

import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import split_tensor_dict

from lora_grpo.adapter import WEIGHTS, name_embedded_base
from lora_grpo.allocator import giving_back
from lora_grpo.atomic import STAGED
from lora_grpo.batch import Batch
from lora_grpo.custom_rewards import RewardError
from lora_grpo.dynamic_sampling import Draw, Replacements, fill_with_signal
from lora_grpo.lora_layers import one_matrix
from lora_grpo.memory_error import RowLimit, release_memory
from lora_grpo.packed_trainer import PackedGRPOTrainer
from lora_grpo.rewards import Reward
from lora_grpo.seams import check_seams

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KEPT_CHECKPOINTS = 2
BEST = "best_adapter.safetensors"  # in a checkpoint: the adapter of the best step up to it
# Unsloth replaces TRL's class while it is imported; its log-probs are in chunks of its own.
BY_UNSLOTH = GRPOTrainer.__name__ == "UnslothGRPOTrainer"


class LoraGRPOTrainer(PackedGRPOTrainer):
    """TRL's trainer for one adapter, with the current batch and each phase's seconds at hand."""

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        rewards: Sequence[Reward],
        args: GRPOConfig,
        peft_config: LoraConfig | None,
        train_dataset: Dataset,
        chunked_logprobs: bool = False,
        say: Callable[[str], None] = print,
        shared_prefix: bool = True,
        replacements: Replacements | None = None,
        columns: Mapping[int, dict[str, Any]] | None = None,
        prefill: str = "",
    ) -> None:
        if not BY_UNSLOTH:
            check_seams(GRPOTrainer)
        torch.manual_seed(args.seed)
        super().__init__(
            model=model,
            reward_funcs=[reward.function for reward in rewards],
            args=args,
            train_dataset=train_dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        if replacements and self.accelerator.num_processes > 1:
            raise ValueError(
                f"--dynamic-sampling: {self.accelerator.num_processes} processes train together, "
                "and each would draw for itself: train in one, or leave the flag out"
            )
        self.replacements = replacements
        self.columns, self.prefill = columns, prefill
        self.reward_func_names = [reward.name for reward in rewards]
        self.batch = Batch()
        self.seconds = {"generate": 0.0, "sync": 0.0, "reward": 0.0, "update": 0.0}
        self.chunked_logprobs = chunked_logprobs
        self.abort_generation: Callable[[], None] = lambda: None
        self.generation_rows = RowLimit(
            "generation", say, self._release_generation, "as many completions are drawn"
        )
        self.scoring_rows = RowLimit("scoring", say)
        self.update_rows = RowLimit("the update", say)
        self._part: dict[str, Any] | None = None
        # TRL casts the adapter of a 4-bit base to bfloat16, whose 8 bits lose updates as small as
        # LoRA's.
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in self.trained:
            parameter.data = parameter.data.float()
        if shared_prefix and not BY_UNSLOTH:
            reason = self.why_trl_updates()
            self.packed = reason is None
            if reason:
                say(f"the update repeats each prompt for every completion, as TRL does: {reason}")

    def _release_generation(self) -> None:
        self.abort_generation()
        # Unsloth sets this while it scores, and takes it back only if nothing fails.
        os.environ.pop("UNSLOTH_RETURN_HIDDEN_STATES", None)
        release_memory()

    def _generate(self, prompts: list) -> tuple:
        started, synced = time.perf_counter(), self.seconds["sync"]
        try:
            with one_matrix(self.model):
                generated = super()._generate(prompts)
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise FloatingPointError("the policy's probabilities are not finite") from error
        synced = self.seconds["sync"] - synced
        self.seconds["generate"] += time.perf_counter() - started - synced
        return generated

    def _generate_single_turn(self, prompt_ids: list[list[int]], *rest: Any, **more: Any) -> tuple:
        turn = super()._generate_single_turn

        def generate(rows: int) -> tuple[list[list[int]], list[list[float]] | None]:
            parts = [
                turn(prompt_ids[start : start + rows], *rest, **more)
                for start in range(0, len(prompt_ids), rows)
            ]
            ids = [row for completion_ids, _ in parts for row in completion_ids]
            if parts[0][1] is None:
                return ids, None
            return ids, [row for _, logprobs in parts for row in logprobs]

        return self.generation_rows.run(generate, len(prompt_ids))

    def _calculate_rewards(
        self,
        inputs: list[dict[str, Any]],
        prompts: list,
        completions: list,
        completion_ids_list: list[list[int]],
    ) -> torch.Tensor:
        started = time.perf_counter()
        told = [self.columns[row["row"]] for row in inputs] if self.columns else inputs
        # As in evaluation: the whole text, begun by the chat template, whatever TRL parses it into.
        texts = self._tokenizer.batch_decode(completion_ids_list, skip_special_tokens=True)
        texts = [self.prefill + text for text in texts]
        completions = [[{"role": "assistant", "content": text}] for text in texts]
        scores = super()._calculate_rewards(told, prompts, completions, completion_ids_list)
        first = self.accelerator.process_index * len(prompts)
        own = scores[first : first + len(prompts)]  # (B, rewards); `scores` holds every process's
        found = own * self.reward_weights.to(own.device)
        if torch.isinf(found).any():
            largest = torch.finfo(found.dtype).max
            names = [self.reward_func_names[i] for i in found.isinf().any(0).nonzero()[:, 0]]
            raise RewardError(
                f"reward {', '.join(names)}: a value times its weight is beyond {largest:.1e}, the "
                "largest number that the update can hold: return smaller ones"
            )
        weighted = found.tolist()
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        self.batch = Batch(
            questions=[row["question"] for row in inputs],
            answers=[row["answer"] for row in inputs],
            completions=texts,
            tokens=[len(ids) for ids in completion_ids_list],
            truncated=[ids[-1] not in ends for ids in completion_ids_list],
            rewards={
                name: [None if math.isnan(row[index]) else row[index] for row in weighted]
                for index, name in enumerate(self.reward_func_names)
            },
        )
        self.seconds["reward"] += time.perf_counter() - started
        return scores

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        def sample(rows: list[dict[str, Any]]) -> Draw:
            output = super(LoraGRPOTrainer, self)._generate_and_score_completions(rows)
            self._log_clipped(output)
            return Draw(output, self.batch)

        drawn = sample(inputs)
        if self.replacements:
            drawn = fill_with_signal(
                drawn,
                sample,
                self.replacements,
                self.state.global_step,
                self.num_generations,
                self._tokenizer.pad_token_id,
            )
            self.batch = drawn.batch
            for name, found in self._metrics["train"].items():
                if name.endswith("/max"):  # TRL would log the mean of the draws' maxima
                    found[:] = [max(found)]
        return drawn.output

    def _log_clipped(self, output: dict[str, Any]) -> None:
        """Log the share of tokens whose ratio to the sampler's log-probs was cut or masked."""
        ratio, cap = output.get("importance_sampling_ratio"), self.vllm_importance_sampling_clip_max
        if ratio is not None:  # (B, T), or (B, 1) by sequence
            mask = output["completion_mask"].bool()
            clipped = ((ratio == 0) | (ratio >= cap)) & mask
            share = (clipped.sum() / mask.sum().clamp(min=1)).item()
            self._metrics["train"]["sampling/importance_sampling_ratio/clipped"].append(share)

    def _get_per_token_logps_and_entropies(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        *rest: Any,
        **more: Any,
    ) -> tuple:
        whole = super()._get_per_token_logps_and_entropies
        if BY_UNSLOTH:
            return whole(
                model, input_ids, attention_mask, logits_to_keep, batch_size, *rest, **more
            )

        def score(rows: int) -> tuple:
            if self.packed:
                found = self.packed_scores(input_ids, attention_mask, logits_to_keep, rows)
                return (*found, None)
            if not self.chunked_logprobs or more.get("compute_aux_loss"):
                return whole(
                    model, input_ids, attention_mask, logits_to_keep, batch_size=rows, **more
                )
            inner, entropy = self.accelerator.unwrap_model(model), more.get("compute_entropy")
            parts = [
                self._chunked_logps(inner, ids, mask, logits_to_keep, compute_entropy=entropy)
                for ids, mask in zip(input_ids.split(rows), attention_mask.split(rows), strict=True)
            ]
            entropies = torch.cat([part[1] for part in parts]) if entropy else None
            return torch.cat([part[0] for part in parts]), entropies, None

        if torch.is_grad_enabled():
            return score(len(input_ids))
        return self.scoring_rows.run(score, len(input_ids), batch_size)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if generation_batch is self._part:
            return generation_batch
        return super()._prepare_inputs(generation_batch)

    def training_step(self, model: torch.nn.Module, inputs: Any, *rest: Any) -> torch.Tensor:
        if self.accelerator.num_processes > 1:
            # One process alone cannot repeat a step that the others wait in.
            loss = super().training_step(model, inputs, *rest)
        else:
            # As transformers does before it prepares inputs: in evaluation mode bitsandbytes packs
            # 4-bit weights for some CPUs as no backward pass can read them.
            model.train()
            micro_batch, started = self._prepare_inputs(inputs), time.perf_counter()
            with self.computing_packed() if self.packed else nullcontext():
                loss = self._repeatable_step(model, micro_batch, *rest)
            self.seconds["update"] += time.perf_counter() - started
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss.item()}")
        return loss

    def _repeatable_step(
        self, model: torch.nn.Module, micro_batch: dict[str, Any], *rest: Any
    ) -> torch.Tensor:
        """Make a micro-batch's backward pass, in as few parts as fit; a failed one adds nothing."""
        earlier = [parameter.grad for parameter in self.trained]

        def update(rows: int) -> torch.Tensor:
            for parameter in self.trained:
                parameter.grad = None
            count = len(micro_batch["completion_ids"]) // rows
            with self._smaller_micro_batch(count):
                step, losses = super(LoraGRPOTrainer, self).training_step, []
                for self._part in split_tensor_dict(micro_batch, count):
                    losses.append(step(model, self._part, *rest))
            return torch.stack(losses).sum()

        with giving_back(self.model.config.get_text_config().hidden_size, self.model.device.type):
            whole = len(micro_batch["completion_ids"])
            # bnpo divides by the tokens of what goes through at once, and the balance of experts is
            # one over them: fewer would be another loss.
            least = whole if self.loss_type == "bnpo" or self.aux_loss_enabled else 1
            loss = self.update_rows.run(update, whole, at_least=least)
        for parameter, gradient in zip(self.trained, earlier, strict=True):
            if gradient is not None:
                new = parameter.grad  # None for an expert that no token went to
                parameter.grad = gradient if new is None else gradient.add_(new)
        return loss

    @contextmanager
    def _smaller_micro_batch(self, count: int):
        """Let TRL weigh each of `count` parts as if the micro-batch had always been that small."""
        step, accumulation = self._step, self.current_gradient_accumulation_steps
        per_generation = self.args.steps_per_generation
        self.current_gradient_accumulation_steps = accumulation * count
        self.args.steps_per_generation = per_generation * count
        try:
            yield
            step += 1
        finally:
            self._part, self._step = None, step
            self.current_gradient_accumulation_steps = accumulation
            self.args.steps_per_generation = per_generation

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        run_dir = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        staged = run_dir / f"{STAGED}{name}"
        self.args.output_dir = str(staged)
        try:
            super()._save_checkpoint(model, trial)
            name_embedded_base(staged / name)
            if (run_dir / WEIGHTS).is_file():
                shutil.copyfile(run_dir / WEIGHTS, staged / name / BEST)
            shutil.rmtree(run_dir / name, ignore_errors=True)
            (staged / name).rename(run_dir / name)
        finally:
            self.args.output_dir = str(run_dir)
            shutil.rmtree(staged, ignore_errors=True)
        rotate_checkpoints(run_dir)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return a run's checkpoints, the oldest first."""
    found = (path for path in run_dir.glob("checkpoint-*") if step_of(path) is not None)
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int | None:
    """Return the step in a checkpoint's name, or None for a folder that is named otherwise."""
    step = checkpoint.name.removeprefix("checkpoint-")
    return int(step) if step.isdecimal() else None


def rotate_checkpoints(run_dir: Path) -> None:
    """Keep the newest checkpoints alone; the older ones lose their names first, so that none is
    ever found half removed."""
    for old in list_checkpoints(run_dir)[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old.rename(run_dir / f"{STAGED}old-{old.name}"))
