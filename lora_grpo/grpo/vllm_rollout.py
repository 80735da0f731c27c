"""vLLM as TRL's trainer calls it: the policy's adapter before each batch, then its completions.

TRL 1.14.2 asks `trainer.vllm_generation` for `sync_weights()` and `generate(...)`; its own merges
the adapter into the base, pushes every weight and unmerges, which a 4-bit base does not survive.
"""

import time
from typing import TYPE_CHECKING, Any

from lora_grpo.policy.open import Policy, VLLMPolicy
from lora_grpo.policy.vllm import Engine

if TYPE_CHECKING:
    from lora_grpo.grpo.trainer import LoraGRPOTrainer

LARGEST_SEED = 2**63


class AdapterRollout:
    """Samples the training rollouts from an engine that follows the trainer's adapter."""

    def __init__(self, engine: Engine, trainer: "LoraGRPOTrainer") -> None:
        self.engine, self.trainer = engine, trainer
        self.calls = 0

    def sync_weights(self) -> None:
        """Let the engine answer as the adapter is now."""
        started = time.perf_counter()
        self.engine.sync(self.trainer.model)
        self.calls = 0
        self.trainer.seconds["sync"] += time.perf_counter() - started

    def generate(
        self, prompts: list[list[int]], images: None, num_generations: int, profiler: Any = None
    ) -> tuple[list, list, list, None]:
        """Return prompts, completions, each token's log-prob as (B, T, 1), and nothing."""
        trainer, args = self.trainer, self.trainer.args
        self.calls += 1  # A step's second call must not draw the same completions again.
        completion_ids, logprobs = self.engine.sample(
            prompts,
            seed=hash((args.seed, trainer.state.global_step, self.calls)) % LARGEST_SEED,
            temperature=trainer.temperature,
            top_p=trainer.top_p,
            max_tokens=trainer.max_completion_length,
        )
        return prompts, completion_ids, [[[value] for value in row] for row in logprobs], None


def sample_with_vllm(trainer: "LoraGRPOTrainer", engine: Engine) -> None:
    """Make the trainer sample from the engine, and correct for what its log-probs differ by.

    The correction is TRL's importance sampling, bounded as `TrainConfig.vllm_correction` says.
    """
    trainer.vllm_generation = AdapterRollout(engine, trainer)
    trainer.use_vllm = True
    trainer._last_loaded_step = -1
    trainer.abort_generation = engine.abort


def attach(policy: Policy, trainer: "LoraGRPOTrainer") -> None:
    """Let the policy answer as the trainer's adapter is at each moment, and its engine, if it has
    one of its own, sample the trainer's rollouts."""
    policy.follow(trainer.model)
    trainer.abort_generation = policy.abort
    if isinstance(policy, VLLMPolicy):
        sample_with_vllm(trainer, policy.engine)
