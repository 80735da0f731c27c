"""A plain transformers model as GGUF's metadata and tensors, for Llama, Qwen2 and Qwen3.

A merged folder goes in; keys, and tensors by GGUF's names one at a time, come out. llama.cpp turns
pairs of neighbouring values by its rotary embedding where transformers turns halves, so that for
Llama the rows of query and key change places.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lora_grpo.merge_inputs import read_base
from lora_grpo.model import read_config
from lora_grpo.safetensors_stream import StoredTensor, read_tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ARCHITECTURES = ("llama", "qwen2", "qwen3")
PERMUTED = ("llama",)
ROPE_TYPES = ("default", "llama3")
ROPE_FREQUENCIES = "rope_freqs.weight"


@dataclass(frozen=True)
class GGUFModel:
    """A merged folder as GGUF sees it: its tensors by GGUF's names."""

    config: "PretrainedConfig"
    tensors: dict[str, StoredTensor]

    @property
    def architecture(self) -> str:
        return self.config.model_type

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        """Return one tensor's values in float32, in GGUF's order of rows."""
        values = read_tensor(self.tensors[name]).float().numpy()
        return permute(self.config, name, values)


def read_model(folder: Path) -> GGUFModel:
    """Return a merged folder as a GGUF model; of the weights only the headers are read.

    Raises:
        ValueError: the model is of another family, or has a feature that is not written here.
    """
    config = read_config(folder)
    check_config(config, folder)
    names = name_map(config)
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in read_base(folder).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"{folder} holds {name}, which GGUF has no name for")
        tensors[found] = tensor
    return GGUFModel(config, tensors)


def check_config(config: "PretrainedConfig", folder: Path) -> None:
    """Raise a ValueError unless a model is of a family and kind that is written here."""
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"--format gguf knows {', '.join(ARCHITECTURES)}, {folder} is {config.model_type}: "
            "export safetensors and convert that with llama.cpp's own script"
        )
    rope = config.rope_parameters["rope_type"]
    if rope not in ROPE_TYPES:
        raise ValueError(
            f"--format gguf knows the rope types {', '.join(ROPE_TYPES)}, {folder} has {rope}: "
            "export safetensors and convert that with llama.cpp's own script"
        )
    if getattr(config, "use_sliding_window", False):
        raise ValueError(f"--format gguf does not write sliding windows, which {folder} uses")


def name_map(config: "PretrainedConfig") -> Any:
    """Return gguf's own table from transformers' tensor names to GGUF's."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(kinds[config.model_type], config.num_hidden_layers)


def head_dim(config: "PretrainedConfig") -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def describe_model(config: "PretrainedConfig") -> dict[str, int | float]:
    """Return the architecture's keys, without the architecture's name in front."""
    keys = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "rope.dimension_count": head_dim(config),
    }
    if head_dim(config) * config.num_attention_heads != config.hidden_size:
        keys |= {"attention.key_length": head_dim(config)}
        keys |= {"attention.value_length": head_dim(config)}
    return keys


def permute(config: "PretrainedConfig", name: str, values: np.ndarray) -> np.ndarray:
    """Return values with the rows of Llama's query and key in GGUF's order, others as they are."""
    if config.model_type not in PERMUTED or (".attn_q." not in name and ".attn_k." not in name):
        return values
    query = ".attn_q." in name
    heads = config.num_attention_heads if query else config.num_key_value_heads
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def extra_tensors(config: "PretrainedConfig") -> Iterator[tuple[str, np.ndarray]]:
    """Yield what GGUF stores and transformers computes: Llama 3's factors of the rotary
    frequencies, (head_dim / 2,), by which llama.cpp divides them."""
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, head_dim(config), 2, dtype=torch.float32) / head_dim(config)
    plain = torch.exp(-exponents * math.log(rope["rope_theta"]))
    yield ROPE_FREQUENCIES, (plain / scaled).numpy()
