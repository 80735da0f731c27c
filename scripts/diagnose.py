"""Say what is wrong with a run, since which step, why, and which setting to change.

    python scripts/diagnose.py adapters/tiny
    python scripts/diagnose.py outputs/checkpoint-500/trainer_state.json    # another TRL trainer's

Expect `nothing wrong in 40 steps` for `make train`, else one line per fault, causes first. Works
while the run goes on. Exit status: 0 diagnosed, 2 bad input.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installation

from lora_grpo.cli import run

if __name__ == "__main__":
    sys.exit(run("diagnose"))
