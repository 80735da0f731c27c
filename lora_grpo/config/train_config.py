"""The training run's settings: one frozen dataclass, its checks, and what is derived from them.

`presets` says where the defaults come from. Nothing heavy is imported here, so that `--help` and a
wrong flag answer at once. A field's docstring is one line: tyro shows the breaks of a longer one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import UseAppendAction

from lora_grpo.data.gold import DecimalSeparator
from lora_grpo.tasks.kinds import TaskName

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LossType = Literal["dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"]
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine"]
Preset = Literal["tiny", "smollm2-135m", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen3-0.6b"]
Backend = Literal["auto", "unsloth", "transformers"]
Rollout = Literal["auto", "vllm", "generate"]
ReportTo = Literal["none", "tensorboard", "trackio", "wandb", "mlflow"]
Level = Literal["token", "sequence"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]
Correction = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
# When a run ends before its last step, which a resumed run may change.
END_SETTINGS = ("max_minutes", "stop_at_accuracy")
# How memory is used, which changes no result: a resumed run may change these.
MEMORY_SETTINGS = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"),
    *("eval_batch_size", "shared_prefix", "gpu_memory"),
    *("vllm_gpu_memory_utilization", "vllm_max_num_seqs"),
)
# How your own rewards are called, which changes no score: a resumed run may change these.
REWARD_CALLS = ("reward_workers", "reward_timeout")
Repeatable = Annotated[tuple[str, ...], UseAppendAction]


@dataclass(frozen=True)
class TrainConfig:
    """Train a LoRA adapter with GRPO, evaluate it against its base, and save it in adapters/<run>.

    Without --preset, --model, --config or --resume the preset is chosen from the hardware.
    """

    preset: Preset | None = None
    """A tested set of defaults, which other flags override."""
    config: Path | None = None
    """A saved train_config.json or a YAML file: defaults that other flags override."""
    resume: Path | None = None
    """Resume the run in this adapter directory; --max-steps may be raised."""
    run_name: str | None = None
    """Directory to write; by default the preset's or model's name, numbered if taken."""
    adapters_dir: Path = Path("adapters")
    """Where adapter directories live."""
    seed: int = 0
    """Seeds the adapter's first weights, the order of prompts and the sampling."""
    dry_run: bool = False
    """Print the resolved configuration and the plan, load no weights, write nothing."""
    preview: bool = False
    """Print three problems as the model will see them, with their gold answers, and stop."""
    length_preview: bool = False
    """Sample 16 completions of up to four times the limit, say which limit holds 90 %, and stop."""
    quiet: bool = False
    """Print only warnings and the final table."""

    model: str = "Qwen/Qwen2.5-0.5B-Instruct"
    """A Hub id, a local model folder, or `tiny` for the embedded model."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model; the commit is recorded."""
    backend: Backend = "auto"
    """What loads and trains the model; auto is unsloth if it is installed and a GPU is there."""
    rollout: Rollout = "auto"
    """What samples completions and evaluates; auto is vllm if installed and a GPU is there."""
    load_in_4bit: bool = True
    """Hold the base's linear layers in NF4: a quarter of the memory, slower on a CPU."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the NF4 scales too, as QLoRA does: 0.4 bits less per weight."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type to compute in; by default bfloat16 or float16 as the GPU can, float32 on a CPU."""
    gpu_memory: float | None = None
    """GB of GPU memory to stay within; by default what is free on the card. The plan fits to it."""
    vllm_gpu_memory_utilization: float | None = None
    """Share of the card for vLLM's weights and cache; by default what the memory plan leaves."""
    vllm_max_num_seqs: int | None = None
    """Completions that vLLM writes at once; by default all of a step, if their cache fits."""
    vllm_importance_sampling_mode: Correction | None = None
    """Bound on the ratio to vLLM's log-probs; token_truncate, as a sequence's is mostly noise."""
    vllm_importance_sampling_clip_max: float | None = None
    """Largest such ratio, by default 3: one above it is cut to it (truncate) or to 0 (mask)."""

    dataset: str = "openai/gsm8k:main"
    """A Hub id (owner/name:config), a data file or folder, `arithmetic`, or reasoning-gym:NAME."""
    eval_dataset: str | None = None
    """Held-out problems; by default the dataset's test or validation split, or a tenth of it."""
    question_column: str | None = None
    """Column of the question, or several joined as body+question; by default a usual name."""
    answer_column: str | None = None
    """Column of the gold answer; by default a usual name, such as answer or solution."""
    task: TaskName = "auto"
    """What an answer is; auto chooses from the gold answers where they leave no doubt."""
    task_file: Path | None = None
    """Your own task: a .py file with parse and same, or with a reward alone (docs/tasks.md)."""
    accuracy_threshold: float = 1.0
    """With a --task-file that has only a reward: what a right answer earns of it, at least."""
    decimal_separator: DecimalSeparator = "auto"
    """How gold answers write decimals: auto is comma where they can be read in no other way."""
    system_prompt_file: Path | None = None
    """Text file to use in place of the built-in system prompt."""
    one_shot: bool = False
    """Put one worked training problem before each question; it is then not trained on."""
    max_prompt_length: int = 512
    """Longest prompt in tokens; longer ones are counted and dropped, never cut."""
    strict_data: bool = False
    """Stop on a row that would be dropped: blank, bad gold answer, overlap, prompt too long."""
    num_eval_items: int | None = None
    """Number of held-out problems to evaluate on, before and after; by default all."""
    difficulty_filter: bool = False
    """Train only on problems that the model at the start solves at times, by sampling each once."""
    difficulty_samples: int = 4
    """Completions per problem for --difficulty-filter."""
    difficulty_problems: int | None = None
    """Problems to sample for --difficulty-filter; by default as many as the run has prompts."""
    curriculum: bool = False
    """Order the problems that --difficulty-filter leaves from easy to hard, over the whole run."""
    num_validation_items: int | None = None
    """Problems held out to choose the best step; by default a tenth, 256 at most. 0: no choice."""

    r: int = 16
    """Rank of the adapter: 16 follows GRPO's sparse signal without many more weights."""
    lora_alpha: int = 32
    """Scale of the adapter: twice the rank, the usual ratio."""
    lora_dropout: float = 0.0
    """0, because with dropout the policy that is trained is not the policy that sampled."""
    target_modules: tuple[str, ...] = LINEAR_LAYERS
    """The seven linear layers of a block; never lm_head or embed_tokens, which Qwen2.5 ties."""
    use_rslora: bool = False
    """Scale by alpha/sqrt(r) (arXiv 2312.03732): for ranks of 64 and more."""
    adapter: str | None = None
    """Continue this adapter: a run, a PEFT folder or a Hub id; it decides --r and the like."""
    init_lora_weights: Literal[True, "gaussian", "orthogonal"] = True
    """Start of the adapter; each of these leaves the base as it is."""

    num_generations: int = 8
    """G, completions per prompt: 8 or more, so that most groups hold both right and wrong ones."""
    max_completion_length: int = 512
    """Longest completion in tokens: GSM8K needs 512, and a truncated completion earns nothing."""
    temperature: float = 1.0
    """1, so that the sampled policy is the one that is trained."""
    top_p: float = 1.0
    """1, for the same reason."""
    beta: float = 0.0
    """Weight of the KL term: 0 saves the reference pass; LoRA stays close to its base anyway."""
    loss_type: LossType = "dapo"
    """How token losses are averaged: dapo counts each token once, so no length is favoured."""
    importance_sampling_level: Level | None = None
    """Ratio per token, or per completion: luspo needs sequence, GSPO is grpo with sequence."""
    epsilon: float | None = None
    """Lower clipping of the ratio: by default 0.2 (PPO), for GSPO 3e-4, for luspo 2e-3."""
    epsilon_high: float | None = None
    """Upper clipping: by default 0.28 (DAPO), for GSPO 4e-4, luspo 2.5e-3; cispo's cap is 5."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the spread of the group, of the batch, or not at all."""
    multi_objective_aggregation: Aggregation = "sum_then_normalize"
    """Advantages of summed rewards, or sums of rewards each normalised in its group (GDPO)."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus, for exploration; above 0 dead groups cost an update too."""
    num_iterations: int = 1
    """Updates on one batch of completions: 1 keeps every update on-policy."""
    dynamic_sampling: bool = False
    """Replace groups whose completions all earned the same (DAPO): more signal, more sampling."""
    dynamic_sampling_rounds: int = 3
    """Most rounds per step in which --dynamic-sampling draws other prompts."""
    mask_truncated_completions: bool = False
    """Leave truncated completions out of the loss instead of letting their low reward count."""

    sft_steps: int = 0
    """Steps of supervised fine-tuning on worked solutions before GRPO, to teach the format."""
    sft_learning_rate: float = 2e-4
    """Learning rate of --sft-steps: it falls linearly to 0."""

    reward_set: Literal["default", "classic", "none"] = "default"
    """Built-in rewards: `default`, `classic` (the five of the usual GSM8K recipe), or `none`."""
    reward: Repeatable = ()
    """Your own, as path/to/file.py:function=weight."""
    reward_weight: Repeatable = ()
    """Change a reward's weight, as name=value."""
    reward_workers: int | None = None
    """Call your own rewards for one completion at a time, so many at once; by default for all."""
    reward_timeout: float | None = None
    """Seconds for each such call; a completion whose score is late is left out of the step."""

    learning_rate: float = 2e-5
    """LoRA wants about ten times the rate of full fine-tuning."""
    lr_scheduler_type: Schedule = "constant_with_warmup"
    """Constant after warm-up, so that a run can be prolonged without changing its past."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the rate rises from 0."""
    weight_decay: float = 0.0
    """0: the adapter's weights are few."""
    max_grad_norm: float = 0.2
    """Clips the gradient; small, because one odd group can dominate a step."""
    optim: str = "adamw_torch"
    """An optimiser by its transformers name; `paged_adamw_8bit` saves memory on a GPU."""
    per_device_train_batch_size: int = 8
    """Micro-batch in completions: memory, not mathematics; it does not change the gradient."""
    gradient_accumulation_steps: int = 8
    """Micro-batches per update; times the micro-batch it gives the completions of a step."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    shared_prefix: bool = True
    """Compute a prompt once for its completions in an update, without padding or whole logits."""
    max_steps: int | None = 250
    """Updates to make; `None` makes num_train_epochs passes over the data."""
    num_train_epochs: float = 1.0
    """Passes over the data, used where max_steps is None."""
    max_minutes: float | None = None
    """End after the step in which so many minutes have passed; the last evaluation comes on top."""
    stop_at_accuracy: float | None = None
    """End at the first validation whose strict accuracy is at least this, as in 0.6."""

    eval_steps: int = 25
    """Steps between validations; the adapter with the best validation accuracy is kept."""
    eval_batch_size: int = 32
    """Problems answered at once in an evaluation."""
    save_steps: int = 25
    """Steps between checkpoints for --resume; the two newest are kept."""
    log_completions_steps: int = 5
    """Steps between those of which one completion is printed and all are recorded."""
    report_steps: int = 10
    """Refresh report.html every so many steps; it is also written at the end."""
    report_to: tuple[ReportTo, ...] = ("none",)
    """Trackers that get each step's figures too, one or several; none: the run's own files only."""

    def __post_init__(self) -> None:
        for words, allows, names in LIMITS:
            for name in names:
                value = getattr(self, name)
                if value is not None and not allows(value):
                    raise ValueError(f"{flag(name)} must be {words}, got {value}")
        check_task(self.task, self.task_file)
        self._check_groups()
        self._check_problems()
        self._check_loss()
        self._check_update()
        if not self.report_to or ("none" in self.report_to and len(self.report_to) > 1):
            raise ValueError(
                f"--report-to must name trackers, or none alone, got {' '.join(self.report_to)}"
            )

    def _check_groups(self) -> None:
        if self.num_generations < 2:
            raise ValueError(
                f"--num-generations must be at least 2, got {self.num_generations}: a group of "
                "one has no advantage"
            )
        if self.completions_per_step % self.num_generations:
            raise ValueError(
                "--per-device-train-batch-size x --gradient-accumulation-steps must be a "
                "multiple of --num-generations, so that a step holds whole groups: got "
                f"{self.per_device_train_batch_size} x {self.gradient_accumulation_steps} with "
                f"{self.num_generations}"
            )

    def _check_problems(self) -> None:
        if self.difficulty_filter and self.max_steps is None:
            raise ValueError(
                "--difficulty-filter with --max-steps None: how many problems an epoch has is only "
                "known after the sampling: give a number of steps"
            )
        if (self.difficulty_problems or self.prompts_per_step) < self.prompts_per_step:
            raise ValueError(
                f"--difficulty-problems must be at least {self.prompts_per_step}, the prompts of a "
                f"step, got {self.difficulty_problems}: some are left out"
            )
        if self.curriculum and not self.difficulty_filter:
            raise ValueError("--curriculum needs --difficulty-filter, which tells easy from hard")
        if self.length_preview and self.resume:
            raise ValueError(
                f"--length-preview with --resume {self.resume}: a run keeps the length it began "
                "with: look before a new run"
            )

    def _check_loss(self) -> None:
        loss, known = f"--loss-type {self.loss_type}", self.loss_settings
        level, needed = known["importance_sampling_level"], NEEDED_LEVEL.get(self.loss_type)
        if needed and level != needed:
            raise ValueError(
                f"--importance-sampling-level {level}: {loss} is made for {needed}: leave it out"
            )
        for name in ("epsilon", "epsilon_high"):
            value = getattr(self, name)
            if value is not None and name not in known:
                raise ValueError(f"{flag(name)} {value:g}: {loss} does not read it: leave it out")
            if value is not None:
                self._check_bound(name, value, level)
        mode = self.vllm_correction["vllm_importance_sampling_mode"]
        if self.loss_type == "vespo" and not mode.startswith("token"):
            raise ValueError(
                f"--vllm-importance-sampling-mode {mode}: {loss} adds up the ratios of tokens: use "
                "token_truncate or token_mask"
            )

    def _check_bound(self, name: str, value: float, level: str) -> None:
        own = loss_defaults(self.loss_type, level)[name]
        got = f"with --loss-type {self.loss_type}, got {value:g}"
        if self.loss_type == "cispo" and value < 1:
            raise ValueError(
                f"{flag(name)} must be at least 1 {got}: cispo caps the ratio itself, not its "
                f"distance from 1, so every weight would become {value:g} (the default is {own:g})"
            )
        if self.loss_type != "cispo" and value > LARGEST_EPSILON[level]:
            why = {
                "token": "it bounds the ratio's distance from 1; only cispo caps the ratio itself",
                "sequence": "the ratio of a completion is the mean of its tokens', so the bound "
                "would never be reached",
            }[level]
            raise ValueError(
                f"{flag(name)} must be at most {LARGEST_EPSILON[level]:g} {got}: {why} (the "
                f"default is {own:g})"
            )

    def _check_update(self) -> None:
        if self.loss_type == "bnpo" and self.gradient_accumulation_steps > 1:
            raise ValueError(
                "--loss-type bnpo divides by each micro-batch's tokens, so its gradient would "
                "depend on the micro-batch: use dapo, or --gradient-accumulation-steps 1 (got "
                f"{self.gradient_accumulation_steps})"
            )
        if self.dynamic_sampling and self.scale_rewards == "batch":
            raise ValueError(
                "--dynamic-sampling with --scale-rewards batch would divide by the spread of "
                "completions that are not learnt from: use group or none"
            )
        if self.stop_at_accuracy is not None and self.num_validation_items == 0:
            raise ValueError(
                f"--stop-at-accuracy {self.stop_at_accuracy:g} with --num-validation-items 0: "
                "without validation no accuracy is known: hold some problems out, or use "
                "--max-minutes"
            )
        if self.reward_timeout is not None and self.reward_workers is None:
            raise ValueError(
                f"--reward-timeout {self.reward_timeout:g} is for the call of one completion: add "
                "--reward-workers N, the number of such calls at once"
            )
        banned = {"lm_head", "embed_tokens"} & set(self.target_modules)
        if banned or not self.target_modules:
            raise ValueError(
                f"--target-modules must name linear layers such as {' '.join(LINEAR_LAYERS)}, got "
                f"{' '.join(self.target_modules) or 'none'}: tied embeddings cannot be adapted"
            )
        if self.init_lora_weights == "orthogonal" and (self.r % 2 or self.load_in_4bit):
            got = f"--r {self.r}" if self.r % 2 else "--load-in-4bit"
            raise ValueError(
                f"--init-lora-weights orthogonal with {got}: PEFT pairs the rows of an even rank, "
                "over weights that are not quantised: use gaussian, or change the other flag"
            )
        if self.save_steps % self.num_iterations:
            raise ValueError(
                f"--save-steps must be a multiple of --num-iterations, got {self.save_steps} and "
                f"{self.num_iterations}: a checkpoint inside one batch of completions could not "
                "be resumed exactly"
            )

    @property
    def loss_settings(self) -> dict[str, Any]:
        """The settings of the loss by TRL's names: as given, or from its paper."""
        return self._given(loss_defaults(self.loss_type, self.importance_sampling_level))

    @property
    def vllm_correction(self) -> dict[str, Any]:
        """The settings of the correction for vLLM's log-probs, by TRL's names."""
        return self._given(VLLM_CORRECTION)

    def _given(self, defaults: dict[str, Any]) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in defaults}
        return defaults | {name: value for name, value in given.items() if value is not None}

    @property
    def start(self) -> str | None:
        """What GRPO starts from, as `eval.json` calls it; None for a fresh adapter."""
        return "sft" if self.sft_steps else "start" if self.adapter else None

    @property
    def completions_per_step(self) -> int:
        """B, the completions of one update."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def prompts_per_step(self) -> int:
        """P = B / G."""
        return self.completions_per_step // self.num_generations

    def prompts_at_once(self, packed: bool) -> int:
        """Return the most prompts that a micro-batch computes.

        A packed step's rows come sorted by prompt, group after group; without its truncated
        completions a group may have a single row.
        """
        size = self.per_device_train_batch_size
        if not packed:
            return size
        if self.mask_truncated_completions:
            return min(size, self.prompts_per_step)
        group, starts = self.num_generations, range(0, self.completions_per_step, size)
        return max((start + size - 1) // group - start // group + 1 for start in starts)

    @property
    def max_sequence_length(self) -> int:
        """Tokens of the longest prompt with the longest completion."""
        return self.max_prompt_length + self.max_completion_length


def check_task(task: str, task_file: Path | None) -> None:
    """Raise a ValueError unless a task of one's own and its file go together."""
    if task == "own" and task_file is None:
        raise ValueError("--task own needs --task-file FILE, with parse, same or reward in it")
    if task_file is not None and task not in ("own", "auto"):
        raise ValueError(f"--task-file {task_file} is a task of its own: leave --task {task} out")


LIMITS: list[tuple[str, Callable[[float], bool], tuple[str, ...]]] = [
    (
        "at least 0",
        lambda value: 0 <= value < math.inf,
        (
            *("num_validation_items", "sft_steps", "beta", "entropy_coef", "weight_decay"),
            *("epsilon", "epsilon_high"),
        ),
    ),
    (
        "at least 1",
        lambda value: value >= 1,
        (
            *("r", "lora_alpha", "max_prompt_length", "max_completion_length", "num_iterations"),
            *("dynamic_sampling_rounds", "per_device_train_batch_size", "max_steps"),
            *("gradient_accumulation_steps", "num_eval_items", "eval_steps", "eval_batch_size"),
            "difficulty_problems",
            *("save_steps", "log_completions_steps", "report_steps", "vllm_max_num_seqs"),
            "reward_workers",
        ),
    ),
    ("at least 2", lambda value: value >= 2, ("difficulty_samples",)),
    (
        "greater than 0",
        lambda value: 0 < value < math.inf,
        (
            *("learning_rate", "sft_learning_rate", "temperature", "max_grad_norm"),
            *("num_train_epochs", "gpu_memory", "max_minutes", "reward_timeout"),
        ),
    ),
    (
        "greater than 1",
        lambda value: 1 < value < math.inf,
        ("vllm_importance_sampling_clip_max",),
    ),
    ("in (0, 1)", lambda value: 0 < value < 1, ("vllm_gpu_memory_utilization",)),
    ("in (0, 1]", lambda value: 0 < value <= 1, ("top_p", "stop_at_accuracy")),
    ("in [0, 1)", lambda value: 0 <= value < 1, ("warmup_ratio", "lora_dropout")),
    (f"from 0 to {2**32 - 1}", lambda value: 0 <= value < 2**32, ("seed",)),
]
# The ratio of one token is within rounding of 1. That of a completion is a product of hundreds:
# rounding alone takes it past the bound, and TRL's default, sequence_mask, drops the completion.
VLLM_CORRECTION = {
    "vllm_importance_sampling_mode": "token_truncate",
    "vllm_importance_sampling_clip_max": 3.0,
}
NEEDED_LEVEL = {"luspo": "sequence", "vespo": "token"}
CLIPPING = {
    # ScaleRL's (arXiv 2510.13786): MiniMax-M1 (2506.13585), whose loss it is, gives no number.
    "cispo": {"epsilon_high": 5.0},
    # Gates and weights in place of clipping: TRL's values of them are the papers' own.
    "sapo": {},
    "vespo": {},
    # arXiv 2602.05261, section 5.1.
    "luspo": {"epsilon": 2e-3, "epsilon_high": 2.5e-3},
}
# PPO's and DAPO's (arXiv 2503.14476), wider above so that rare good tokens can grow; and GSPO's
# (2507.18071, section 5.1).
BY_LEVEL = {
    "token": {"epsilon": 0.2, "epsilon_high": 0.28},
    "sequence": {"epsilon": 3e-4, "epsilon_high": 4e-4},
}
LARGEST_EPSILON = {"token": 1.0, "sequence": 0.1}


def loss_defaults(loss_type: str, level: str | None = None) -> dict[str, Any]:
    """Return the settings that a loss reads in TRL 1.14.2, with the values from its paper."""
    level = level or NEEDED_LEVEL.get(loss_type, "token")
    return {"importance_sampling_level": level, **CLIPPING.get(loss_type, BY_LEVEL[level])}


def flag(name: str) -> str:
    """Return a field's name as the user types it."""
    return "--" + name.replace("_", "-")
