#!/usr/bin/env python3
"""Merge a LoRA adapter into its base as a plain 16-bit model, proven to be the same policy.

    python scripts/merge_adapter.py adapters/<run> --output-dir merged/<run>

It prints the distances of the proof, which merge_report.json in the folder holds too. The merged
model is as far from base + adapter as rounding noise is: a KL of about 1e-5 nats a token in
bfloat16. Exit status: 0 merged and proven, 1 the proof failed and nothing was kept, 2 the input
cannot be merged.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installation

from lora_grpo.machine.terminal import command_line, run_command


def main() -> None:
    import tyro

    from lora_grpo.merge.command import MergeConfig, merge_adapter

    result = merge_adapter(tyro.cli(MergeConfig))
    print(result.table)
    print(f"merged model: {result.folder}")
    print(f"next: {command_line('evaluate.py', '--model', result.folder)}")


if __name__ == "__main__":
    sys.exit(run_command(main, "interrupted: nothing was written"))
