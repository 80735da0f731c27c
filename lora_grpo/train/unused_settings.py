"""The settings that a run does not read because of its backend, its rollout or another setting.

The plan mentions those that the user set, and `train_config.json` records null for all of them.
"""

from lora_grpo.config.presets import PRESETS
from lora_grpo.config.train_config import REWARD_CALLS, TrainConfig, flag
from lora_grpo.data.sources import BUILT_IN
from lora_grpo.machine.backend import Choice
from lora_grpo.policy.base import Placement, is_local


def find_unused(config: TrainConfig, choice: Choice, placement: Placement) -> dict[str, str]:
    """Return the settings that this run does not read, with the reasons."""
    vllm, unsloth = choice.rollout == "vllm", choice.backend == "unsloth"
    of_vllm = ("vllm_gpu_memory_utilization", "vllm_max_num_seqs", *config.vllm_correction)
    by_steps = config.max_steps is not None and config.resume is None
    built_in = {config.dataset, config.eval_dataset or BUILT_IN} == {BUILT_IN}
    rows: list[tuple[bool, str, tuple[str, ...]]] = [
        (not vllm, "completions do not come from vLLM", of_vllm),
        (vllm, "vLLM fills its batches itself, see --vllm-max-num-seqs", ("eval_batch_size",)),
        (
            vllm and placement.device == "cpu",
            "on a CPU vLLM takes what its cache needs",
            ("vllm_gpu_memory_utilization",),
        ),
        (unsloth, "Unsloth's update is its own", ("shared_prefix",)),
        (
            not config.difficulty_filter,
            "no --difficulty-filter",
            ("difficulty_samples", "difficulty_problems"),
        ),
        (not config.dynamic_sampling, "no --dynamic-sampling", ("dynamic_sampling_rounds",)),
        (
            config.multi_objective_aggregation == "normalize_then_sum",
            "normalize_then_sum divides by each reward's spread, then by the batch's",
            ("scale_rewards",),
        ),
        (config.sft_steps == 0, "no --sft-steps", ("sft_learning_rate",)),
        (not config.reward, "no --reward of your own", REWARD_CALLS),
        (by_steps, "--max-steps decides; --max-steps None takes epochs", ("num_train_epochs",)),
        (
            config.lr_scheduler_type == "constant",
            "--lr-scheduler-type constant has no warm-up, constant_with_warmup has",
            ("warmup_ratio",),
        ),
        (config.num_validation_items == 0, "--num-validation-items is 0", ("eval_steps",)),
        (is_local(config.model), "the model is a local folder", ("revision",)),
        (config.task_file is None, "no --task-file says what is right", ("accuracy_threshold",)),
        (built_in, "the problems are built in", ("question_column", "answer_column")),
    ]
    return {name: reason for unused, reason, names in rows if unused for name in names}


def describe_unused(config: TrainConfig, unused: dict[str, str]) -> list[str]:
    """Return a sentence for each setting that the user set and the run does not read."""
    preset = PRESETS.get(config.preset, {})
    return [
        f"{flag(name)} {getattr(config, name)} is not used: {reason}"
        for name, reason in unused.items()
        if getattr(config, name) != preset.get(name, getattr(TrainConfig, name))
    ]
