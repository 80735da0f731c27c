"""Evaluate an adapter against its base, or a model alone, on held-out problems, greedily.

    python scripts/evaluate.py adapters/tiny
    python scripts/evaluate.py --model merged/tiny --dataset arithmetic

For an adapter that train_lora.py wrote, the figures equal those of its eval.json.
"""

import sys

import tyro


def main() -> int:
    from lora_grpo.evaluate import EvaluateConfig, evaluate

    config = tyro.cli(EvaluateConfig)
    from lora_grpo.console import Display

    display = Display()
    try:
        report = evaluate(config, display.bar)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for note in report.get("notes", ()):
        display.say(note)
    display.results(report)
    if config.output:
        display.say(f"written: {config.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
