#!/usr/bin/env python3
"""Time this project against plain TRL on the same work, and its merge against PEFT's.

    python scripts/benchmark.py                                    # the embedded model, two minutes
    python scripts/benchmark.py all --json benchmarks.json --plot benchmarks.png

Prints seconds a step by phase, peak memory and their ratios as Markdown. Exit status: 0 measured,
1 a run failed, 2 bad input.
"""

import sys

import tyro

from lora_grpo.benchmark import BenchmarkConfig, run

if __name__ == "__main__":
    try:
        sys.exit(run(tyro.cli(BenchmarkConfig)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
