"""What is compared with plain TRL, and the ratios that are aimed at.

A case of kind `steps` times GRPO steps, `learning` a run until the adapter answers well, `merge` a
merge against PEFT's. Nothing heavy is imported here.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

PROJECT, TRL, PEFT, PROVEN = "lora_grpo", "trl", "peft", "lora_grpo with its proof"
Kind = Literal["steps", "learning", "merge"]
Signal = Literal["own", "every group", "half of the groups"]


@dataclass(frozen=True)
class Case:
    """One comparison; `flags` are train_lora.py's.

    With `lengths` (prompt, completion) both sides get the same random tokens instead of sampling,
    so that a step is the update alone. `signal` says which groups have rewards that differ: as the
    run's own rewards fall, or by a reward that is made for it. `targets` are ratios to the other
    side, of a step's or run's seconds and of the peak memory.
    """

    name: str
    title: str
    flags: tuple[str, ...]
    kind: Kind = "steps"
    signal: Signal = "own"
    lengths: tuple[int, int] | None = None
    targets: dict[str, float] = field(default_factory=dict)

    @property
    def sides(self) -> tuple[str, ...]:
        """Who does the work: this project first, then what it is compared with."""
        return (PROJECT, PEFT, PROVEN) if self.kind == "merge" else (PROJECT, TRL)

    def record(self) -> dict[str, Any]:
        """Return the case as JSON holds it."""
        return asdict(self)


def whole(model: str, prompts: int, generations: int, length: int) -> tuple[str, ...]:
    """Return the flags of a run in float32, a micro-batch a group."""
    settings = {
        "model": model,
        "max-completion-length": length,
        "num-generations": generations,
        "per-device-train-batch-size": generations,
        "gradient-accumulation-steps": prompts,
    }
    flags = (word for name, value in settings.items() for word in (f"--{name}", str(value)))
    return ("--no-load-in-4bit", *flags)


def update_alone(model: str, generations: int, prompt: int, completion: int) -> Case:
    """Return the case of one group of a prompt, where one quantity at a time is doubled."""
    return Case(
        f"scaling-g{generations}-p{prompt}-t{completion}",
        f"1 x ({prompt} + {generations} x {completion})",
        (*whole(model, 1, generations, completion), "--dataset", "arithmetic"),
        signal="every group",
        lengths=(prompt, completion),
    )


# Completions, tokens of the prompt, tokens of a completion: one of them doubles at a time.
SCALING = (
    *((4, 128, 64), (8, 128, 64), (16, 128, 64)),
    *((4, 256, 64), (4, 512, 64)),
    *((4, 128, 128), (4, 128, 256)),
)
NAMES = Literal[
    *("all", "embedded", "smollm2", "smollm2-half-dead", "qwen-update"),
    *("learning", "scaling", "merge"),
]


def find_cases(names: tuple[str, ...], smollm2: str, qwen: str, gsm8k: str) -> list[Case]:
    """Return the cases of these names, with these models and this dataset."""
    on_gsm8k = (*whole(smollm2, 4, 8, 96), "--dataset", gsm8k)
    cases = {
        "embedded": [Case("embedded", "embedded model, 16 x 8 x 64", ("--preset", "tiny"))],
        "smollm2": [
            Case(
                "smollm2",
                "SmolLM2-135M on GSM8K, 4 x 8 x 96",
                on_gsm8k,
                signal="every group",
                targets={"seconds": 0.5, "peak_bytes": 0.5},
            )
        ],
        "smollm2-half-dead": [
            Case(
                "smollm2-half-dead",
                "the same, half of the groups dead",
                on_gsm8k,
                signal="half of the groups",
                targets={"seconds": 0.35},
            )
        ],
        "qwen-update": [
            Case(
                "qwen-update",
                "Qwen2.5-0.5B, update alone, 1 x (256 + 8 x 64)",
                (*whole(qwen, 1, 8, 64), "--dataset", "arithmetic"),
                signal="every group",
                lengths=(256, 64),
                targets={"seconds": 0.4, "peak_bytes": 0.4},
            )
        ],
        "learning": [
            Case(
                "learning",
                "embedded model, steps until 0.90 of 256 problems are answered",
                ("--preset", "tiny"),
                kind="learning",
                targets={"seconds": 0.6},
            )
        ],
        "scaling": [update_alone(smollm2, *sizes) for sizes in SCALING],
        "merge": [
            Case(
                "merge",
                "merging into Qwen2.5-0.5B",
                ("--model", qwen),
                kind="merge",
                targets={"seconds": 1.0, "peak_bytes": 0.35},
            )
        ],
    }
    chosen = cases if "all" in names else names
    return [case for name in chosen for case in cases[name]]
