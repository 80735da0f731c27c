"""GGUF files, tensor by tensor: a merged model in one type of weights, or a LoRA adapter alone.

Memory stays near the largest tensor, whatever the size of the model.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lora_grpo.export.gguf.quants import QUANTS, choose_type, quantize
from lora_grpo.export.gguf.tokenizer import Vocabulary, write_vocabulary
from lora_grpo.merge.deltas import Delta
from lora_grpo.merge.inputs import read_base
from lora_grpo.merge.tensors import StoredTensor, read_tensor
from lora_grpo.policy.base import read_config

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter
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

    def read(self, name: str) -> np.ndarray:
        """Return one tensor's values in float32, in GGUF's order of rows."""
        return permute(self.config, name, read_floats(self.tensors[name]))


def read_floats(stored: StoredTensor) -> np.ndarray:
    return read_tensor(stored).float().numpy()


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


def rope_factors(config: "PretrainedConfig") -> np.ndarray:
    """Return Llama 3's factors of the rotary frequencies, (head_dim / 2,), by which llama.cpp
    divides them; transformers computes them and GGUF stores them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, head_dim(config), 2, dtype=torch.float32) / head_dim(config)
    plain = torch.exp(-exponents * math.log(config.rope_parameters["rope_theta"]))
    return (plain / scaled).numpy()


# A tensor's shape, its type, and what gives its values in float32.
Part = tuple[tuple[int, ...], "GGMLQuantizationType", Callable[[], np.ndarray]]


def write_model(
    path: Path, model: GGUFModel, vocabulary: Vocabulary, quant: str, name: str
) -> None:
    """Write a model's file; `name` is what people will call it.

    Raises:
        ValueError: a value does not fit the type.
    """
    import gguf

    writer = gguf.GGUFWriter(path, model.architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(QUANTS[quant].file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in describe_model(model.config).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{model.architecture}.{key}", value)
    write_vocabulary(writer, vocabulary)
    parts: dict[str, Part] = {}
    if model.config.rope_parameters["rope_type"] == "llama3":
        factors = rope_factors(model.config)
        kind = gguf.GGMLQuantizationType.F32
        parts[ROPE_FREQUENCIES] = (factors.shape, kind, lambda: factors)
    for tensor, stored in model.tensors.items():
        kind = choose_type(tensor, stored.shape, QUANTS[quant])
        parts[tensor] = (stored.shape, kind, partial(model.read, tensor))
    write_tensors(writer, parts)


def write_tensors(writer: "GGUFWriter", parts: dict[str, Part]) -> None:
    """Write a file's header and then its tensors, each made when its turn comes."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
    try:
        for name, (shape, kind, _) in parts.items():
            dtype = np.dtype(plain.get(kind, np.uint8))
            stored = shape if kind in plain else quant_shape_to_byte_shape(shape, kind)
            nbytes = int(np.prod(stored)) * dtype.itemsize
            writer.add_tensor_info(name, stored, dtype, nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, (_, kind, produce) in parts.items():
            writer.write_tensor_data(quantize(produce(), kind, name))
    finally:
        writer.close()


def write_adapter(
    path: Path,
    config: "PretrainedConfig",
    deltas: dict[str, Delta],
    lora_alpha: float,
    name: str,
) -> None:
    """Write a LoRA adapter's file, for `llama-cli --lora`.

    llama.cpp scales each pair by lora_alpha / rank; where PEFT scales otherwise (rank-stabilised
    LoRA, patterns) the difference goes into B.
    """
    import gguf

    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(lora_alpha))
    parts: dict[str, Part] = {}
    for weight, delta in deltas.items():
        target = name_map(config).get_name(weight, try_suffixes=(".weight",))
        if target is None or delta.transposed:
            raise ValueError(f"the adapter changes {weight}, which GGUF has no name for")
        kind = gguf.GGMLQuantizationType.F32
        a = (delta.a.shape, kind, partial(read_floats, delta.a))
        b = (delta.b.shape, kind, partial(read_b, config, delta, target, lora_alpha))
        parts |= {f"{target}.lora_a": a, f"{target}.lora_b": b}
    write_tensors(writer, parts)


def read_b(config: "PretrainedConfig", delta: Delta, target: str, lora_alpha: float) -> np.ndarray:
    """Return B, (out, r), in float32 and GGUF's order of rows, scaled so that lora_alpha / r is all
    that is left to scale by."""
    rank = delta.a.shape[0]
    values = read_floats(delta.b) * np.float32(delta.scaling * rank / lora_alpha)
    return permute(config, target, values)
