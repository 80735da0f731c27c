"""Say whether this machine can train, how it would, and what to type to mend what is wrong.

    python scripts/doctor.py
    python scripts/doctor.py --json    # for a bug report; no token, no user name, no home path

Looks at Python, the system, the GPU and its driver, the packages and the Hub, and imports torch,
bitsandbytes, trl, unsloth and vllm in processes of their own: a crash is a row. Expect one screen
within some seconds that ends in `It can train`. Exit status: 0 when the main job can run, 1 when it
cannot, 2 for bad input.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installation

from lora_grpo.cli import run

if __name__ == "__main__":
    sys.exit(run("doctor"))
