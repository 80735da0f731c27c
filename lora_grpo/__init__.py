"""Memory-efficient LoRA fine-tuning with GRPO: train, evaluate and merge a reasoning adapter."""

__version__ = "0.1.0"

import logging

# On a processor with AVX512-BF16 it warns of a kernel that `keep_4bit_as_stored` never lets it use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
