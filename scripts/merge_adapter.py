"""Merge a LoRA adapter into its base as a plain 16-bit model, proven to be the same policy.

    python scripts/merge_adapter.py adapters/<run> --output-dir merged/<run>

It prints the distances of the proof, which merge_report.json in the folder holds too. The merged
model is as far from base + adapter as rounding noise is: a KL of about 1e-5 nats per token in
bfloat16. Exit status: 0 merged and proven, 1 the proof failed and nothing was kept, 2 the input
cannot be merged.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installation

from lora_grpo.cli import run

if __name__ == "__main__":
    sys.exit(run("merge"))
