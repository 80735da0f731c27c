"""Evaluate an adapter against its base, or a model alone, on held-out problems, greedily.

    python scripts/evaluate.py adapters/tiny
    python scripts/evaluate.py --model merged/tiny --dataset arithmetic

For an adapter that train_lora.py wrote, the figures equal those of its eval.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installation

from lora_grpo.machine.terminal import run_command


def main() -> None:
    import tyro

    from lora_grpo.results.evaluate import EvaluateConfig, evaluate
    from lora_grpo.train.console import Display

    config, display = tyro.cli(EvaluateConfig), Display()
    report = evaluate(config, display.bar)
    for note in report.get("notes", ()):
        display.say(note)
    display.results(report)
    if config.output:
        display.say(f"written: {config.output}")


if __name__ == "__main__":
    sys.exit(run_command(main))
