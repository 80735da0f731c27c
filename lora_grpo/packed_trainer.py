"""TRL's trainer with an update that repeats no work; the loss is TRL's own code, untouched.

Each different prompt goes through the model once, without padding (`shared_prefix`); the output
layer is applied where a completion's token is predicted, in tiles (`tiled_logprobs`); rows without
a gradient are not computed, and hold the old log-probs or zeros instead (`live_rows`).
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from trl import GRPOTrainer

from lora_grpo.live_rows import arrange, live_rows, silence_dead_groups
from lora_grpo.lora_layers import fused
from lora_grpo.shared_prefix import attention_in_groups, pack, why_not_packed
from lora_grpo.shared_sampling import sample, why_not_sampled
from lora_grpo.tiled_logprobs import TiledLogProbs, has_plain_head


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
