"""Memory-efficient LoRA fine-tuning with GRPO: train, evaluate and merge a reasoning adapter.

Promised names: `EMBEDDED_FOLDER`, where the model lies that comes with the package.
"""

__version__ = "0.1.0"

import logging
from importlib import import_module

# On a processor with AVX512-BF16 it warns of a kernel that `keep_4bit_as_stored` never lets it use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> object:
    if name == "EMBEDDED_FOLDER":
        return import_module("lora_grpo.policy.base").EMBEDDED_FOLDER
    raise AttributeError(f"module 'lora_grpo' has no attribute {name!r}")
