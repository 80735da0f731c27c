"""Push an adapter to the Hugging Face Hub, and what is made of it; private unless told otherwise.

    python scripts/push_to_hub.py adapters/<run> --repo you/name --dry-run
    python scripts/push_to_hub.py adapters/<run> --repo you/name --merged --gguf q8_0,q4_k_m

The Hub's listing is compared with what was sent before it says done; a second push of the same
files changes nothing. Log in first with `hf auth login`, or set HF_TOKEN. Exit status: 0 all is
there, 1 the Hub failed or does not hold what was sent, 2 bad input or a question answered with no.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installation

from lora_grpo.cli import run

if __name__ == "__main__":
    sys.exit(run("push"))
