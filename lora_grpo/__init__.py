"""Memory-efficient LoRA fine-tuning with GRPO: train, evaluate and merge a reasoning adapter."""

__version__ = "0.1.0"
