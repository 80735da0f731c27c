"""Time this project against plain TRL on the same work, and its merge against PEFT's.

    python scripts/benchmark.py                              # the embedded model, two minutes
    python scripts/benchmark.py all --json benchmarks.json   # an hour and a half; can be stopped

Prints seconds per step by phase, peak memory and their ratios as Markdown.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installation

from lora_grpo.machine.terminal import run_command


def main() -> None:
    import tyro

    from lora_grpo.dev.benchmark import BenchmarkConfig, run_benchmark

    run_benchmark(tyro.cli(BenchmarkConfig))


if __name__ == "__main__":
    sys.exit(run_command(main))
