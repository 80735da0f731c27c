"""Push an adapter to the Hugging Face Hub, and what is made of it; private unless told otherwise.

    python scripts/push_to_hub.py adapters/<run> --repo you/name --dry-run
    python scripts/push_to_hub.py adapters/<run> --repo you/name --merged --gguf q8_0,q4_k_m

What was sent is listed and read back from the Hub before it says done; a second push of the same
files changes nothing. Log in first with `hf auth login`, or set HF_TOKEN. Exit status: 0 all is
there, 1 the Hub failed or does not hold what was sent, 2 bad input or a question answered with no.
"""

import sys

import tyro

from lora_grpo.export import ExportProofError
from lora_grpo.merge import MergeProofError
from lora_grpo.push import PushConfig, push_to_hub
from lora_grpo.push_end import PushError


def main() -> int:
    config = tyro.cli(PushConfig, description=__doc__)
    try:
        push_to_hub(config)
    except (PushError, ExportProofError, MergeProofError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: run it again, what arrived is not sent twice", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
