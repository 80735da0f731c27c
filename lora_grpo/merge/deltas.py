"""An adapter directory becomes deltas: by the name of the base tensor, what LoRA adds to it.

PEFT's file format and formula: scaling * B @ A with scaling = alpha / r, or alpha / sqrt(r) for
rank-stabilised LoRA (arXiv 2312.03732), r and alpha by module where the config holds patterns.
Whatever is more than that is refused by name.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_grpo.merge.tensors import StoredTensor, read_header, read_tensor
from lora_grpo.policy.adapter import CONFIG, WEIGHTS, check_adapter

LORA_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
COPY_KEY = re.compile(r"base_model\.model\.(?P<module>.+?)(\.base_layer)?\.weight")
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")
ALTERS_THE_BASE = re.compile(r"pissa.*|corda.*|olora|loftq|lora_ga")
NOT_A_PLAIN_DELTA = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "modules_to_save",
)
# PEFT's own merge loses LoRA on embeddings that are tied, so that it is named with a condition.
OTHERWISE = (
    "use the adapter as it is, with chat.py and evaluate.py, or try PEFT's merge_and_unload and "
    "compare the logits of what it saved"
)


@dataclass(frozen=True)
class Delta:
    """One adapted weight: where B (out, r) and A (r, in) are stored."""

    module: str
    a: StoredTensor
    b: StoredTensor
    scaling: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        out_features, in_features = self.b.shape[0], self.a.shape[1]
        return (in_features, out_features) if self.transposed else (out_features, in_features)

    def compute(self) -> torch.Tensor:
        """Return what the weight gains, in float32 and in the weight's own shape."""
        product = read_tensor(self.b).float() @ read_tensor(self.a).float()
        product *= self.scaling
        return product.T if self.transposed else product


def check_adapter_dir(directory: Path) -> Path:
    """Return the directory if it holds an adapter that can be merged as it is.

    Raises:
        ValueError, FileNotFoundError: it does not; the message says what to point at instead.
    """
    if (directory / "adapter_model.bin").is_file() and not (directory / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"{directory} holds adapter_model.bin and no {WEIGHTS}: load it with PEFT and save it "
            "again"
        )
    return check_adapter(directory, "merge_adapter.py")


def refuse_unmergeable(adapter: dict[str, Any]) -> None:
    """Raise a ValueError unless a config says: plain LoRA on linear layers of an untouched base."""
    if adapter.get("peft_type") != "LORA":
        raise ValueError(
            f"{CONFIG} says peft_type {adapter.get('peft_type')}: only LORA can be merged"
        )
    if adapter.get("bias", "none") != "none":
        raise ValueError(
            f"{CONFIG} says bias {adapter['bias']!r}: trained biases are not merged here; "
            f"{OTHERWISE}"
        )
    for name in NOT_A_PLAIN_DELTA:
        if adapter.get(name):
            raise ValueError(
                f"{CONFIG} says {name} {adapter[name]!r}: only plain LoRA on linear layers is "
                f"merged here; {OTHERWISE}"
            )
    start = adapter.get("init_lora_weights")
    if isinstance(start, str) and ALTERS_THE_BASE.fullmatch(start.lower()):
        raise ValueError(
            f"{CONFIG} says init_lora_weights {start!r}, which changed the base before training: "
            "save the adapter again with PEFT's path_initial_model_for_weight_conversion"
        )


def read_deltas(
    adapter_dir: Path, adapter: dict[str, Any], base: dict[str, StoredTensor]
) -> dict[str, Delta]:
    """Return the adapter's deltas by the name of the base tensor.

    Copies of tensors of the `base`, which PEFT and Unsloth save for embeddings, change nothing.

    Raises:
        ValueError: the file holds more than pairs of LoRA matrices, or others than the config says.
    """
    sides: dict[str, dict[str, StoredTensor]] = {}
    for key, tensor in read_header(adapter_dir / WEIGHTS).items():
        found = LORA_KEY.fullmatch(key)
        if found is not None:
            sides.setdefault(found["module"], {})[found["side"]] = tensor
        elif not is_copy(key, tensor, base):
            raise ValueError(
                f"the adapter holds {key}, which is no LoRA matrix of a linear layer: trained "
                f"embeddings, biases and whole modules are not merged here; {OTHERWISE}"
            )
    return {
        f"{module}.weight": build_delta(module, pair, adapter) for module, pair in sides.items()
    }


def is_embedding(module: str) -> bool:
    return module.rpartition(".")[2] in EMBEDDINGS


def is_copy(key: str, tensor: StoredTensor, base: dict[str, StoredTensor]) -> bool:
    """Return whether an adapter's tensor is the base's own; of a tied pair the base stores one."""
    found = COPY_KEY.fullmatch(key)
    if found is None:
        return False
    names = [f"{found['module']}.weight"]
    if is_embedding(found["module"]):
        names += [name for name in base if is_embedding(name.removesuffix(".weight"))]
    original = next((base[name] for name in names if name in base), None)
    if original is None or original.shape != tensor.shape:
        return False
    return read_tensor(tensor).float().equal(read_tensor(original).float())


def build_delta(module: str, pair: dict[str, StoredTensor], adapter: dict[str, Any]) -> Delta:
    if pair.keys() != {"A", "B"}:
        raise ValueError(
            f"the adapter holds lora_{next(iter(pair))} alone for {module}: save it again"
        )
    a, b = pair["A"], pair["B"]
    r = match_pattern(adapter.get("rank_pattern"), module, adapter["r"])
    alpha = match_pattern(adapter.get("alpha_pattern"), module, adapter["lora_alpha"])
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != r or b.shape[1] != r:
        raise ValueError(
            f"{module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, but {CONFIG} says "
            f"rank {r}: the two files are not of one adapter"
        )
    scaling = alpha / (math.sqrt(r) if adapter.get("use_rslora") else r)
    return Delta(module, a, b, scaling, transposed=bool(adapter.get("fan_in_fan_out")))


def match_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """Return the value of the first pattern that the module's name ends with."""
    from peft.utils.other import get_pattern_key

    return (patterns or {}).get(get_pattern_key(patterns or {}, module), default)


def check_learned(adapter_dir: Path, deltas: dict[str, Delta]) -> None:
    """Raise a ValueError if an adapter holds a value that is no number, or changes nothing."""
    learned = False
    for delta in deltas.values():
        sides = [(stored, read_tensor(stored)) for stored in (delta.a, delta.b)]
        for stored, values in sides:
            if not torch.isfinite(values).all():
                raise ValueError(
                    f"{stored.name} in {adapter_dir} holds values that are not finite: the run "
                    "diverged, use an earlier checkpoint"
                )
        learned = learned or all(values.any() for _, values in sides)
    if not learned:
        raise ValueError(
            f"{adapter_dir} changes nothing (lora_B is zero everywhere): nothing was learned, so "
            "the merged model would be the base; train first"
        )
