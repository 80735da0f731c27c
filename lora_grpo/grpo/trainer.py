"""The GRPO update: TRL's `GRPOTrainer` on the adapter alone, made exact to resume, open to look
into, and not ended by running out of memory.

Each method that is overridden stands in `seams` with its reason and TRL's version; the ones that
save work are in `packed_trainer`. The mathematics is TRL's.
"""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import split_tensor_dict

from lora_grpo.grpo.batch import Batch
from lora_grpo.grpo.groups import (
    Draw,
    Replacements,
    arrange,
    fill_with_signal,
    live_rows,
    silence_dead_groups,
)
from lora_grpo.grpo.logprobs import TiledLogProbs, has_plain_head
from lora_grpo.grpo.packing import attention_in_groups, pack, why_not_packed
from lora_grpo.grpo.seams import check_seams
from lora_grpo.machine.allocator import giving_back
from lora_grpo.machine.files import STAGED
from lora_grpo.machine.out_of_memory import RowLimit, release_memory
from lora_grpo.policy.adapter import WEIGHTS, name_embedded_base
from lora_grpo.policy.layers import fused, one_matrix
from lora_grpo.policy.sampling import sample, why_not_sampled
from lora_grpo.rewards.builtin import Reward
from lora_grpo.rewards.custom import RewardError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class PackedGRPOTrainer(GRPOTrainer):
    """TRL's trainer; `packed` says whether the update packs its rows, or is TRL's own."""

    packed = False
    update_inputs: dict[str, Any] | None = None
    tokens_computed = 0

    def inner_model(self) -> torch.nn.Module:
        """Return the model that the adapter is in, without PEFT's wrapper."""
        return self.accelerator.unwrap_model(self.model).get_base_model()

    def why_trl_updates(self) -> str | None:
        """Return why the update cannot be packed, or None where it can."""
        inner = self.inner_model()
        if self.accelerator.num_processes > 1:
            return "several processes update together"
        if self.aux_loss_enabled:
            return "the loss has a term for the balance of the experts"
        if not has_plain_head(inner):
            return "the output layer is more than a frozen matrix"
        return why_not_packed(inner)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        self.update_inputs = inputs
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self.update_inputs = None

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], *rest: Any, **more: Any
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        if not self.packed or self.use_vllm or why_not_sampled(self.generation_config):
            return super()._generate_single_turn(prompt_ids, *rest, **more)
        inner, was_training = self.inner_model(), self.model.training
        self.model.eval()  # without gradient checkpointing, which keeps no cache
        try:
            with self.accelerator.autocast():
                settings = (self.generation_config, self.eos_token_ids, self.max_completion_length)
                return sample(inner, prompt_ids, *settings), None
        finally:
            self.model.train(was_training)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        output["advantages"] = silence_dead_groups(
            output["advantages"], self.batch.totals(), self.num_generations
        )
        return output

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        of_one_step = self.args.steps_per_generation == self.args.gradient_accumulation_steps
        if not self.packed or not of_one_step or self._buffered_inputs is before:
            return inputs
        self._buffered_inputs = arrange(self._buffered_inputs, self.beta)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    @contextmanager
    def computing_packed(self) -> Iterator[None]:
        """Let the model compute packed rows; an update needs it through its backward pass."""
        inner = self.inner_model()
        with attention_in_groups(inner), fused(inner):
            yield

    def packed_logps(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probs and entropies (B, T) of completions, as the model is now.

        In an update (where gradients are wanted) rows without one are left out: their log-probs
        are the old ones, so that their ratio is 1, and their entropies the mean of the others',
        which leaves TRL's mean as it is among the computed (not a number where none is).
        """
        shape = (len(input_ids), completion_length)
        old, rows = None, range(len(input_ids))
        if torch.is_grad_enabled():
            rows = live_rows(self.update_inputs, self.beta)
            old = self.update_inputs.get("old_per_token_logps")
        blank = torch.zeros(shape, device=input_ids.device)
        logps = blank if old is None else old.float()
        rows = [row for row in rows if attention_mask[row, -completion_length:].any()]
        if not rows:
            # A loss without a graph could not be passed to `backward`; this one's gradient is 0.
            return logps + sum((p * 0).sum() for p in self.trained), blank + torch.nan
        packed = pack(input_ids, attention_mask, completion_length, rows)
        inner = self.inner_model()
        with self.accelerator.autocast():
            hidden = inner.base_model(
                input_ids=packed.input_ids,
                position_ids=packed.position_ids,
                use_cache=False,
                groups=packed.groups,
            ).last_hidden_state[0, packed.predictors]
            weight = inner.get_output_embeddings().weight
            found = TiledLogProbs.apply(hidden, weight, packed.targets, self.temperature)
        self.tokens_computed += packed.input_ids.numel()
        place, usual = (packed.rows, packed.columns), torch.zeros_like(blank)
        if torch.is_grad_enabled():
            usual += found[1].mean()
        return logps.index_put(place, found[0]), usual.index_put(place, found[1])

    def packed_scores(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, length: int, rows: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `packed_logps` does, of so many rows at once."""
        # An update holds it already.
        with nullcontext() if torch.is_grad_enabled() else self.computing_packed():
            parts = [
                self.packed_logps(*part, length)
                for part in zip(input_ids.split(rows), attention_mask.split(rows), strict=True)
            ]
        logps, entropies = zip(*parts, strict=True)
        return torch.cat(logps), torch.cat(entropies)

    def padding_share(self) -> float | None:
        """Return the share of padding in a step's micro-batches as they would be unpacked."""
        masks = [
            (batch["prompt_mask"], batch["completion_mask"]) for batch in self._buffered_inputs
        ]
        there = sum(mask.numel() for pair in masks for mask in pair)
        return (
            1 - sum(mask.sum().item() for pair in masks for mask in pair) / there if there else None
        )


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
