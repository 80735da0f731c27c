"""Serve an adapter with its base, or a merged model, over the OpenAI API.

    python scripts/serve.py adapters/tiny            # vLLM: models `base` and `tiny`
    python scripts/serve.py merged/tiny              # vLLM, or else transformers' own server
    python scripts/serve.py merged/tiny --dry-run    # the commands alone

It prints the command that it runs and, once the server answers, a curl line that asks the run's
first held-out question as in training. Exit status: 0 ended by Ctrl-C, 1 the server ended by
itself, 2 it cannot be served.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installation

from lora_grpo.cli import run

if __name__ == "__main__":
    sys.exit(run("serve"))
