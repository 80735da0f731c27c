"""Evaluate an adapter against its base, or a model alone, on held-out problems, greedily.

    python scripts/evaluate.py adapters/tiny
    python scripts/evaluate.py --model merged/tiny --dataset arithmetic

For an adapter that train_lora.py wrote, the figures equal those of its eval.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installation

from lora_grpo.cli import run

if __name__ == "__main__":
    sys.exit(run("evaluate"))
