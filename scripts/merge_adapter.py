#!/usr/bin/env python3
"""Merge a LoRA adapter into its base as a plain 16-bit model, proven to be the same policy.

    python scripts/merge_adapter.py adapters/<run> --output-dir merged/<run>

It prints the distances of the proof, which merge_report.json in the folder holds too. The merged
model is as far from base + adapter as rounding noise is: a KL of about 1e-5 nats a token in
bfloat16. Exit status: 0 merged and proven, 1 the proof failed and nothing was kept, 2 the input
cannot be merged.
"""

import sys

import tyro

from lora_grpo.merge import MergeConfig, MergeProofError, merge_adapter


def main() -> int:
    config = tyro.cli(MergeConfig)
    try:
        result = merge_adapter(config)
    except MergeProofError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    print(result.table)
    print(f"merged model: {result.folder}")
    print(f"next: python scripts/evaluate.py --model {result.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
