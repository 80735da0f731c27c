"""Train a LoRA adapter with GRPO, evaluate it against its base, and save it in adapters/<run>.

    python scripts/train_lora.py                        # the preset that fits this machine
    python scripts/train_lora.py --preset tiny          # no GPU, no network: minutes on two cores
    python scripts/train_lora.py --resume adapters/tiny # resume after a stop

On the embedded model strict accuracy on 512 held-out problems rises from 8 % to about 95 %.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installation

from lora_grpo.cli import run

if __name__ == "__main__":
    sys.exit(run("train"))
