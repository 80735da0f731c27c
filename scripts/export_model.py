"""Export an adapter to the formats that people run, each proven to be the merged model.

    python scripts/export_model.py adapters/<run> --format gguf --quant q8_0,q4_0
    python scripts/export_model.py adapters/<run> --format ollama
    python scripts/export_model.py merged/<run> --format gguf bnb-4bit --num-items 256

It prints a table of sizes and distances and the command that runs each export. An 8-bit file is
about 1e-4 to 1e-3 nats a token from the merged model. Exit status: 0 exported and proven, 1 a proof
failed and nothing was kept, 2 the input cannot be exported so.
"""

import sys

import tyro

from lora_grpo.export import ExportProofError, export_model
from lora_grpo.export_config import ExportConfig
from lora_grpo.merge import MergeProofError


def main() -> int:
    config = tyro.cli(ExportConfig, description=__doc__)
    try:
        result = export_model(config)
    except (ExportProofError, MergeProofError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    print(result.table)
    print(f"exported: {result.folder}")
    for command in result.commands:
        print(f"next: {command}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
