"""Predict the peak memory of a training run before any weights load, and fit it to a card.

    python scripts/plan_memory.py --preset qwen2.5-0.5b --gpu-memory 8
    python scripts/plan_memory.py --preset tiny --measure

Takes train_lora.py's flags. Without a GPU and without --gpu-memory it predicts the memory of the
process on this CPU; --measure then makes two steps and prints the measured peak, expected within
15 % where completions reach their limit (docs/memory.md). Exit status: 0 it fits, 1 nothing fits, 2
bad input.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installation

from lora_grpo.cli import run

if __name__ == "__main__":
    sys.exit(run("plan"))
