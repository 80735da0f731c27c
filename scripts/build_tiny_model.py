"""Rebuild the embedded tiny model from a seed: tokenizer and pre-training.

    python scripts/build_tiny_model.py --output-dir /tmp/tiny_model
    python scripts/evaluate.py --model /tmp/tiny_model --dataset arithmetic   # expect 8 % strict

It took 47 minutes on two cores that other work shared.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installation

from lora_grpo.machine.terminal import run_command


@dataclass(frozen=True)
class BuildConfig:
    """Rebuild the embedded tiny model."""

    output_dir: Path
    """Folder to write, which must not exist; copy it over lora_grpo/tiny_model to use it."""
    seed: int = 0
    """Seeds the data, the first weights and the answer styles."""
    steps: int | None = None
    """Pre-training steps; by default those of the model that the package holds."""

    def __post_init__(self) -> None:
        if self.output_dir.exists():
            raise ValueError(
                f"--output-dir {self.output_dir} exists already: choose another folder"
            )
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"--steps must be at least 1, got {self.steps}")


def main() -> None:
    import tyro

    config = tyro.cli(BuildConfig)
    from lora_grpo.dev.tiny_model import build_tiny_model

    build_tiny_model(config.output_dir, config.seed, config.steps)
    print(f"written: {config.output_dir}")
    print(f"next: python scripts/evaluate.py --model {config.output_dir} --dataset arithmetic")


if __name__ == "__main__":
    sys.exit(run_command(main))
