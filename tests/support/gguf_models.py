"""Small random models of the three families that are written as GGUF."""

import functools
from pathlib import Path

import torch
from merge_models import fresh_folder, make_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama untied": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "llama3 rope": lambda: LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE),
    "qwen2": lambda: Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=True),
}


@functools.cache
def make_model(kind: str) -> Path:
    """Return the folder of a random bfloat16 model, which is not to be changed."""
    folder = fresh_folder()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]())
    for name, parameter in model.named_parameters():
        scale = 0.3 if parameter.ndim == 2 else 0.1
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=scale)
    model.to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
