"""The base model and its LoRA adapter: finding the folder, loading it in 4-bit or whole, wrapping
it with PEFT."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_grpo.atomic import read_json
from lora_grpo.prompt import find_turn_end, has_system_role

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import (
        BitsAndBytesConfig,
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

EMBEDDED = "tiny"
EMBEDDED_FOLDER = Path(__file__).parent / "tiny_model"


def is_local(name: str) -> bool:
    """Return whether a model is the embedded one or a folder, not one of the Hub's."""
    return name == EMBEDDED or Path(name).expanduser().is_dir()


def resolve_model(name: str, revision: str | None = None, weights: bool = True) -> Path:
    """Return the local folder of a model: the embedded one, the user's, or a snapshot from the Hub.

    Without `weights`, a snapshot holds no more than what a plan needs.

    Raises:
        FileNotFoundError: the folder holds no model, or there is no such folder and the Hub cannot
        give one.
    """
    folder = EMBEDDED_FOLDER if name == EMBEDDED else Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"--model {name} is a folder without config.json: give a Hugging Face model folder"
            )
        return folder.resolve()
    return download_model(name, revision, ["*.safetensors"] if weights else [])


def download_model(name: str, revision: str | None, weights: list[str]) -> Path:
    """Return a snapshot of a Hub repository from the cache or the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "README.md", *weights]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"--model {name} is neither a local folder nor a repository that the Hub gave "
            f"({reason}): "
            "give the path of a model folder, or use --preset tiny, which needs no network"
        ) from error


@dataclass(frozen=True)
class Placement:
    """Where and in what type the model computes."""

    device: str
    dtype: str


def choose_placement(dtype: str | None = None) -> Placement:
    """Return the device, and the compute type that it is good at unless one is named."""
    import torch

    if not torch.cuda.is_available():
        return Placement("cpu", dtype or "float32")
    # A T4 emulates bfloat16, many times slower than the float16 that it has.
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Placement("cuda", dtype or ("bfloat16" if has_bfloat16 else "float16"))


def read_config(folder: Path) -> "PretrainedConfig":
    """Return a model's configuration; code that comes with a model is never run.

    Raises:
        ValueError: the model cannot be loaded without code of its own.
    """
    from transformers import AutoConfig

    check_architecture(folder)
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def check_architecture(folder: Path) -> None:
    """Raise a ValueError for a model that transformers has no class of its own for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = read_json(folder / "config.json")
    if config.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    code = (
        "comes with code of its own, which is never run here, and" if "auto_map" in config else ""
    )
    raise ValueError(
        f"{folder} {code} is of model_type {config.get('model_type')!r} (config.json), for which "
        "transformers has no causal language model: use a model of an architecture that it has"
    )


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Load a tokenizer that pads on the left, as generation needs, with one chat template.

    Raises:
        ValueError: it has no chat template that can be rendered, or no token that ends a turn.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, padding_side="left", trust_remote_code=False
        )
    except ValueError as error:  # code of its own, or a class that is not there
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the tokenizer of {folder} cannot be loaded: {reason}") from error
    tokenizer.chat_template = choose_template(folder, tokenizer.chat_template)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {folder} names no EOS token: name one in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    has_system_role(tokenizer)
    return tokenizer


def choose_template(folder: Path, template: str | dict[str, str] | None) -> str:
    """Return the chat template for plain conversations, of several the one named `default`."""
    if isinstance(template, dict):
        if "default" not in template and len(template) > 1:
            raise ValueError(
                f"the tokenizer of {folder} has several chat templates and none is named "
                f"'default': {', '.join(sorted(template))}; keep one in its chat_template.jinja"
            )
        template = template.get("default") or next(iter(template.values()), None)
    if not template and (folder / "chat_template.json").is_file():  # where older versions put it
        template = read_json(folder / "chat_template.json").get("chat_template")
    if not template:
        raise ValueError(f"{folder} has no chat template: use an instruct model")
    return template


def quantization(load_in_4bit: bool, double_quant: bool, dtype: str) -> "BitsAndBytesConfig | None":
    """Return the NF4 settings of QLoRA (Dettmers et al. 2023, arXiv 2305.14314), or None for whole
    weights."""
    if not load_in_4bit:
        return None
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def end_of_turn_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return every token that ends a completion: the tokenizer's EOS first, then what the model
    declares, then what its chat template writes after an assistant's turn."""
    return merge_end_ids(tokenizer, model.generation_config.eos_token_id)


def declared_end_ids(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the same as `end_of_turn_ids` from a model folder, without its weights."""
    from transformers import GenerationConfig

    try:
        declared = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:
        declared = read_config(folder).get_text_config().eos_token_id
    return merge_end_ids(tokenizer, declared)


def merge_end_ids(
    tokenizer: "PreTrainedTokenizerBase", declared: int | list[int] | None
) -> list[int]:
    """Return the tokenizer's EOS, the declared end ids and the chat template's, each once."""
    declared = [declared] if isinstance(declared, int) else list(declared or [])
    found = [tokenizer.eos_token_id, *declared, find_turn_end(tokenizer)]
    return list(dict.fromkeys(token for token in found if token is not None))


def public_name(folder: Path) -> str:
    """Return the Hub id of a snapshot's folder (`models--owner--name/snapshots/<commit>`), else the
    folder itself."""
    if folder.parent.name != "snapshots":
        return str(folder)
    return "/".join(folder.parent.parent.name.split("--")[1:])


def load_base(
    folder: Path, placement: Placement, load_in_4bit: bool, double_quant: bool = True
) -> "PreTrainedModel":
    """Load the base model, its linear layers in NF4 where asked, on one device.

    The model goes by its Hub id where it has one, so that an adapter names that and not a cache's
    folder.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        trust_remote_code=False,
        dtype=getattr(torch, placement.dtype),
        quantization_config=quantization(load_in_4bit, double_quant, placement.dtype),
        device_map={"": placement.device},
    )
    model.name_or_path = model.config._name_or_path = public_name(folder)
    if load_in_4bit:
        keep_4bit_as_stored(model)
    return model


def keep_4bit_as_stored(model: "PreTrainedModel") -> None:
    """Keep a processor with AVX512-BF16 from repacking 4-bit weights when it first generates.

    bitsandbytes would compute in bfloat16 from then on, other numbers than in training, and the
    repacked weights cannot be trained on.
    """
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def load_adapter(base: "PreTrainedModel", directory: Path) -> "PeftModel":
    """Put a saved adapter on its base, for inference."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base, directory)


def write_dequantised(model: "PreTrainedModel", source: Path, folder: Path) -> Path:
    """Write the weights that a 4-bit model computes with as a plain model folder, and return it."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from safetensors.torch import save_file

    tied = set(model.all_tied_weights_keys)
    weights: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(prefix=name, recurse=False):
            if key in tied:
                continue
            if isinstance(module, Linear4bit) and key.endswith("weight"):
                parameter = dequantize_4bit(parameter.data, parameter.quant_state)
            weights[key] = parameter.detach().contiguous()
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = read_config(source)
    config.dtype = next(iter(weights.values())).dtype
    config.save_pretrained(folder)
    return folder
