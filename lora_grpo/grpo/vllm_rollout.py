"""vLLM as TRL's trainer calls it: `trainer.vllm_generation.sync_weights()` sends the current
adapter, `.generate(...)` samples completions (TRL 1.14.2 and 1.16.0).

TRL's own class merges the adapter into the base, pushes every weight and unmerges, which would
change a 4-bit base.
"""

import time
from typing import TYPE_CHECKING, Any

from lora_grpo.policy.open import Policy, VLLMPolicy
from lora_grpo.policy.vllm import Engine

if TYPE_CHECKING:
    from lora_grpo.grpo.trainer import LoraGRPOTrainer

LARGEST_SEED = 2**63


class AdapterRollout:
    """Samples completions for training from an engine that has the trainer's current adapter."""

    def __init__(self, engine: Engine, trainer: "LoraGRPOTrainer") -> None:
        self.engine, self.trainer = engine, trainer
        self.calls = 0

    def sync_weights(self) -> None:
        """Send the current adapter to the engine."""
        started = time.perf_counter()
        self.engine.sync(self.trainer.model)
        self.calls = 0
        self.trainer.step.seconds["sync"] += time.perf_counter() - started

    def generate(
        self, prompts: list[list[int]], images: None, num_generations: int, profiler: Any = None
    ) -> tuple[list, list, list, None]:
        """Return prompts, completions, each token's log-prob as (B, T, 1), and nothing."""
        trainer, args = self.trainer, self.trainer.args
        self.calls += 1  # A step's second call must not draw the same completions again.
        # Numbers have the same hash in every process; a resumed run draws what it would have drawn.
        completion_ids, logprobs = self.engine.sample(
            prompts,
            seed=hash((args.seed, trainer.state.global_step, self.calls)) % LARGEST_SEED,
            temperature=trainer.temperature,
            top_p=trainer.top_p,
            max_tokens=trainer.max_completion_length,
        )
        return prompts, completion_ids, [[[value] for value in row] for row in logprobs], None


def sample_with_vllm(trainer: "LoraGRPOTrainer", engine: Engine) -> None:
    """Make the trainer sample from the engine.

    TRL's importance sampling corrects for the difference between the two sets of log-probs, bounded
    as `TrainConfig.vllm_correction` says.
    """
    trainer.vllm_generation = AdapterRollout(engine, trainer)
    trainer.use_vllm = True
    trainer._last_loaded_step = -1
    trainer.abort_generation = engine.abort


def attach(policy: Policy, trainer: "LoraGRPOTrainer") -> None:
    """Let the policy use the trainer's current adapter, and the trainer sample from the policy's
    engine, if it has one of its own."""
    policy.follow(trainer.model)
    trainer.abort_generation = policy.abort
    if isinstance(policy, VLLMPolicy):
        sample_with_vllm(trainer, policy.engine)
