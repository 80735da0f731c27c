"""Check rewards before they train anything: no model, no GPU, a second.

    python scripts/check_rewards.py
    python scripts/check_rewards.py --reward my_rewards.py:brevity=0.5 --dataset problems.jsonl

Scores about 60 tricky completions and checks that a correct, well-formed one outranks every other;
with --dataset also runs each gold answer through the reward. Expect `ranking: right`. Exit status:
0 when all is right, 1 when a ranking or a gold answer is wrong, 2 for bad input.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installation

from lora_grpo.cli import run

if __name__ == "__main__":
    sys.exit(run("check-rewards"))
