"""Serve an adapter with its base, or a merged model, over the OpenAI API.

    python scripts/serve.py adapters/tiny            # vLLM: models `base` and `tiny`
    python scripts/serve.py merged/tiny              # vLLM, or else transformers' own server
    python scripts/serve.py merged/tiny --dry-run    # the commands alone

It prints the command that it runs and, once the server answers, a curl line that asks the run's
first held-out question as in training. Exit status: 0 ended by Ctrl-C, 1 the server ended by
itself, 2 it cannot be served.
"""

import sys

import tyro

from lora_grpo.serve import ServeConfig, serve


def main() -> int:
    config = tyro.cli(ServeConfig)
    try:
        return serve(config)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ended", file=sys.stderr)
        return 0


if __name__ == "__main__":
    sys.exit(main())
