"""A pre-quantised bitsandbytes folder: NF4 as the policy was trained on, which transformers and
vLLM load as it is."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_grpo.export.reload import describe_difference, prove_folder
from lora_grpo.export.source import HERE, ExportedFormat, Say, Source
from lora_grpo.policy.base import choose_placement, load_base
from lora_grpo.proof.reference import Reference, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST_KL = 1.0


def write_bnb(source: Source, folder: Path, reference: Reference, say: Say) -> ExportedFormat:
    """Quantise the merged model, save it, and prove the folder by loading it again."""
    double_quant = source.record.double_quant
    with quiet_transformers():
        model = load_base(source.merged, choose_placement("bfloat16"), True, double_quant)
        model.save_pretrained(folder)
        del model
        say("proving bnb-4bit")
        return prove_bnb(source, folder, reference, double_quant)


def prove_bnb(
    source: Source, folder: Path, reference: Reference, double_quant: bool
) -> ExportedFormat:
    """Compare a 4-bit folder with the merged model."""
    expected = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
    }
    found = prove_folder(source, folder, reference, compare_weight, expected, LARGEST_KL)
    command = ("vllm", "serve", HERE, "--quantization", "bitsandbytes")
    return replace(found, commands=(command,))


def compare_weight(model: "PreTrainedModel", name: str, merged: torch.Tensor) -> str | None:
    """Compare a 4-bit weight with what bitsandbytes' own functions make of the merged one, any
    other with the merged one itself."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from bitsandbytes.nn import Linear4bit

    weight = model.get_parameter(name)
    layer = model.get_submodule(name.rpartition(".")[0])
    if not isinstance(layer, Linear4bit) or not name.endswith(".weight"):
        return describe_difference(weight.detach().cpu(), merged)
    state = weight.quant_state
    packed, own = quantize_4bit(
        merged, blocksize=state.blocksize, compress_statistics=state.nested, quant_type="nf4"
    )
    found = dequantize_4bit(weight.data, state).cpu()
    return describe_difference(found, dequantize_4bit(packed, own))
