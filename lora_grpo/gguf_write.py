"""GGUF files, tensor by tensor: a merged model in one type of weights, or a LoRA adapter alone.

Memory stays near the largest tensor, whatever the size of the model.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lora_grpo.gguf_model import GGUFModel, describe_model, extra_tensors, name_map, permute
from lora_grpo.gguf_quants import QUANTS, choose_type, quantize
from lora_grpo.gguf_tokenizer import Vocabulary, write_vocabulary
from lora_grpo.lora_delta import Delta
from lora_grpo.safetensors_stream import read_tensor

Produce = Callable[[], np.ndarray]


def write_model(path: Path, model: GGUFModel, vocabulary: Vocabulary, quant: str, name: str) -> int:
    """Write a model's file and return its size in bytes; `name` is what people will call it.

    Raises:
        ValueError: a value does not fit the type.
    """
    import gguf

    writer = gguf.GGUFWriter(path, model.architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(QUANTS[quant].file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_keys(writer, model.architecture, describe_model(model.config))
    write_vocabulary(writer, vocabulary)
    parts: dict[str, tuple[tuple[int, ...], Any, Produce]] = {}
    for tensor, values in extra_tensors(model.config):
        parts[tensor] = (values.shape, gguf.GGMLQuantizationType.F32, lambda values=values: values)
    for tensor in model.tensors:
        shape = model.shape(tensor)
        kind = choose_type(tensor, shape, QUANTS[quant])
        parts[tensor] = (shape, kind, lambda tensor=tensor: model.read(tensor))
    write_tensors(writer, parts)
    return path.stat().st_size


def add_keys(writer: Any, architecture: str, keys: dict[str, int | float]) -> None:
    for key, value in keys.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{architecture}.{key}", value)


def write_tensors(writer: Any, parts: dict[str, tuple[tuple[int, ...], Any, Produce]]) -> None:
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
    path: Path, config: Any, deltas: dict[str, Delta], lora_alpha: float, name: str
) -> int:
    """Write a LoRA adapter's file, for `llama-cli --lora`, and return its size in bytes.

    llama.cpp scales each pair by lora_alpha / rank; where PEFT scales otherwise (rank-stabilised
    LoRA, patterns) the difference goes into B.
    """
    import gguf

    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(lora_alpha))
    parts: dict[str, tuple[tuple[int, ...], Any, Produce]] = {}
    for weight, delta in deltas.items():
        target = name_map(config).get_name(weight, try_suffixes=(".weight",))
        if target is None or delta.transposed:
            raise ValueError(f"the adapter changes {weight}, which GGUF has no name for")
        kind = gguf.GGMLQuantizationType.F32
        parts[f"{target}.lora_a"] = (delta.a.shape, kind, lambda d=delta: read_a(d))
        parts[f"{target}.lora_b"] = (
            delta.b.shape,
            kind,
            lambda d=delta, t=target: read_b(config, d, t, lora_alpha),
        )
    write_tensors(writer, parts)
    return path.stat().st_size


def read_a(delta: Delta) -> np.ndarray:
    """Return A, (r, in), in float32."""
    return read_tensor(delta.a).float().numpy()


def read_b(config: Any, delta: Delta, target: str, lora_alpha: float) -> np.ndarray:
    """Return B, (out, r), in float32 and GGUF's order of rows, scaled so that lora_alpha / r is all
    that is left to scale by."""
    rank = delta.a.shape[0]
    values = read_tensor(delta.b).float().numpy() * np.float32(delta.scaling * rank / lora_alpha)
    return permute(config, target, values)
