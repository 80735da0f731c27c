"""A pre-quantised bitsandbytes folder: NF4 as the policy was trained on, which transformers and
vLLM load as it is."""

from collections.abc import Callable
from pathlib import Path

import torch

from lora_grpo.export.source import HERE, Outcome, Source
from lora_grpo.machine.files import read_json
from lora_grpo.machine.out_of_memory import release_memory
from lora_grpo.merge.inputs import read_base
from lora_grpo.merge.tensors import read_tensor
from lora_grpo.policy.adapter import read_train_config
from lora_grpo.policy.base import choose_placement, keep_4bit_as_stored, load_base
from lora_grpo.proof.checks import Check, check_folder, check_reload, describe_distance
from lora_grpo.proof.distance import collect_logits
from lora_grpo.proof.reference import Reference, quiet_transformers


def write_bnb(
    source: Source, folder: Path, seen: Reference, report: Callable[[str], None]
) -> Outcome:
    """Quantise the merged model, save it, and prove the folder by loading it again."""
    double_quant = read_train_config(source.records).get("bnb_4bit_use_double_quant", True)
    with quiet_transformers():
        model = load_base(source.merged, choose_placement("bfloat16"), True, double_quant)
        model.save_pretrained(folder)
        del model
        report("proving bnb-4bit")
        return prove_bnb(source, folder, seen, double_quant)


def prove_bnb(source: Source, folder: Path, seen: Reference, double_quant: bool) -> Outcome:
    """Load a 4-bit folder as any user does, and compare it with the merged model."""
    from transformers import AutoModelForCausalLM

    release_memory()
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, output_loading_info=True, trust_remote_code=False
        )
        keep_4bit_as_stored(model.eval(), model.dtype)
        logits = list(collect_logits(model, seen.sequences))
    except Exception as error:  # whatever it is, the user's own load would meet it too
        return Outcome((Check("reload", False, f"{type(error).__name__}: {error}"),), {}, ())
    checks = [
        check_reload(loading),
        check_weights(source.merged, model),
        check_settings(folder, double_quant),
        *check_folder(source.merged, folder, model),
    ]
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    figures = {"bytes": size, "from_merged": describe_distance(seen.logits, logits)}
    return Outcome(
        tuple(checks), figures, (("vllm", "serve", HERE, "--quantization", "bitsandbytes"),)
    )


def check_settings(folder: Path, double_quant: bool) -> Check:
    """Compare what the folder says of its quantisation with what was asked for."""
    found = read_json(folder / "config.json").get("quantization_config", {})
    expected = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
    }
    faults = [
        f"{name} is {found.get(name)}"
        for name, value in expected.items()
        if found.get(name) != value
    ]
    detail = "; ".join(faults) or f"NF4, {'double' if double_quant else 'single'} quantisation"
    return Check("quantization", not faults, detail)


def check_weights(merged: Path, model: torch.nn.Module) -> Check:
    """Compare every weight: a 4-bit one with what bitsandbytes' own functions make of the merged
    one, any other with the merged one itself."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from bitsandbytes.nn import Linear4bit

    layers = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    held, faults = dict(model.named_parameters()), []
    for name, tensor in read_base(merged).items():
        if name not in held:
            continue
        expected = read_tensor(tensor).to(torch.bfloat16)
        found = held[name].detach().cpu()
        if name in layers:
            state = layers[name].weight.quant_state
            found = dequantize_4bit(layers[name].weight.data, state).cpu()
            packed, own = quantize_4bit(
                expected,
                blocksize=state.blocksize,
                compress_statistics=state.nested,
                quant_type="nf4",
            )
            expected = dequantize_4bit(packed, own)
        if not torch.equal(found, expected):
            error = (found.float() - expected.float()).abs().max().item()
            faults.append(f"{name} differs by up to {error:.3g}")
    detail = "; ".join(faults[:3]) or f"{len(held)} as quantised apart, {len(layers)} in 4-bit"
    return Check("tensors", not faults and bool(layers), detail)
