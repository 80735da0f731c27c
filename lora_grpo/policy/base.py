"""The base model: its folder, its tokenizer and end-of-turn tokens, and its weights in 4, 16 or 32
bits, with a saved adapter on them."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_grpo.data.prompt import find_turn_end, has_system_role
from lora_grpo.machine.files import read_json

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import (
        BitsAndBytesConfig,
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

EMBEDDED = "tiny"
# The names under which PEFT saves an embedding or output layer that was trained as a whole.
WHOLE_EMBEDDING = re.compile(
    r"\.(embed_tokens|lm_head|wte|embed_in|embed_out|word_embeddings)(\.base_layer)?\.weight$"
)
EMBEDDED_FOLDER = Path(__file__).parents[1] / "tiny_model"


def is_local(name: str) -> bool:
    """Return whether a model is the embedded one or a local folder, not a Hub id."""
    return name == EMBEDDED or Path(name).expanduser().is_dir()


def resolve_model(
    name: str, revision: str | None = None, weights: bool = True, named_in: Path | None = None
) -> Path:
    """Return the local folder of a model: the embedded one, the user's, or a snapshot from the Hub.

    Without `weights` only the small files of a snapshot are downloaded. `named_in` is the file that
    names the model, if no flag does; error messages mention it.

    Raises:
        FileNotFoundError: the folder holds no model, or it is neither a folder nor on the Hub.
        ValueError: the model needs code of its own.
    """
    folder = EMBEDDED_FOLDER if name == EMBEDDED else Path(name).expanduser()
    if not folder.is_dir():
        folder = download_model(name, revision, ["*.safetensors"] if weights else [], named_in)
    elif not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{name_model(name, named_in)} is a folder without config.json: "
            f"{'give' if named_in is None else 'give with --model'} a Hugging Face model folder"
        )
    if weights:
        check_architecture(folder)
    return folder.resolve()


def name_model(name: str, named_in: Path | None) -> str:
    return f"--model {name}" if named_in is None else f"the base {name}, which {named_in} names,"


def download_model(
    name: str, revision: str | None, weights: list[str], named_in: Path | None = None
) -> Path:
    """Return a snapshot of a Hub repository from the cache or the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "README.md", *weights]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        advice = (
            "give the path of a model folder, or use --preset tiny, which needs no network"
            if named_in is None
            else "give the path or Hub id of that base with --model"
        )
        raise FileNotFoundError(
            f"{name_model(name, named_in)} is neither a local folder nor a repository that the Hub "
            f"gave ({reason}): {advice}"
        ) from error


@dataclass(frozen=True)
class Placement:
    """The device and the data type that the model computes in."""

    device: str
    dtype: str


def choose_placement(dtype: str | None = None) -> Placement:
    """Return the device, and the given data type or the one that suits the device."""
    import torch

    if not torch.cuda.is_available():
        return Placement("cpu", dtype or "float32")
    # A T4 emulates bfloat16, which is many times slower than its float16.
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Placement("cuda", dtype or ("bfloat16" if has_bfloat16 else "float16"))


def read_config(folder: Path) -> "PretrainedConfig":
    """Return a model's configuration, without running code that comes with the model.

    Raises:
        ValueError: the model needs code of its own.
    """
    from transformers import AutoConfig

    check_architecture(folder)
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def check_architecture(folder: Path) -> None:
    """Raise a ValueError for a model that transformers itself has no class for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = read_json(folder / "config.json")
    if config.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    code = ", and code that comes with a model is never run" if "auto_map" in config else ""
    raise ValueError(
        f"transformers has no causal language model for {folder}, whose config.json says "
        f"model_type {config.get('model_type')!r}{code}: use a model of another architecture"
    )


def read_tokenizer(folder: Path, **settings: Any) -> "PreTrainedTokenizerBase":
    """Load a tokenizer as it is stored, with one chat template or none.

    Raises:
        ValueError: it cannot be loaded, or needs code of its own.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **settings)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the tokenizer of {folder} cannot be loaded: {reason}") from error
    tokenizer.chat_template = choose_template(folder, tokenizer.chat_template)
    return tokenizer


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Load a tokenizer that pads on the left, as generation needs, with one chat template.

    Raises:
        ValueError: it has no chat template that can be rendered, or no EOS token.
    """
    tokenizer = read_tokenizer(folder, padding_side="left")
    if tokenizer.chat_template is None:
        raise ValueError(f"{folder} has no chat template: use an instruct model")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {folder} names no EOS token: name one in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    has_system_role(tokenizer)
    return tokenizer


def fit_padding(tokenizer: "PreTrainedTokenizerBase", base: Path) -> None:
    """Pad with the EOS token if the base has no embedding for the padding token: some tokenizers
    were extended without the model."""
    if tokenizer.pad_token_id >= read_config(base).get_text_config().vocab_size:
        tokenizer.pad_token = tokenizer.eos_token


def choose_template(folder: Path, template: str | dict[str, str] | None) -> str | None:
    """Return the chat template; of several, the one named `default`."""
    if isinstance(template, dict):
        if "default" not in template and len(template) > 1:
            raise ValueError(
                f"the tokenizer of {folder} has several chat templates and none is named "
                f"'default': {', '.join(sorted(template))}; keep one in its chat_template.jinja"
            )
        template = template.get("default") or next(iter(template.values()), None)
    if not template and (folder / "chat_template.json").is_file():  # from older versions
        template = read_json(folder / "chat_template.json").get("chat_template")
    return template or None


def is_stored_in_4bit(folder: Path) -> bool:
    """Return whether a folder holds a model that bitsandbytes quantised to 4 bits."""
    stored = read_json(folder / "config.json").get("quantization_config") or {}
    return bool(stored.get("load_in_4bit") or stored.get("_load_in_4bit"))


def check_trainable(folder: Path) -> None:
    """Raise a ValueError for a base that is stored quantised in another way than NF4."""
    stored = read_json(folder / "config.json").get("quantization_config") or {}
    quant_type = stored.get("bnb_4bit_quant_type")
    if not stored or (is_stored_in_4bit(folder) and quant_type == "nf4"):
        return
    raise ValueError(
        f"the base {folder} is stored quantised ({stored.get('quant_method')}"
        f"{f' {quant_type}' if quant_type else ''}), and only bitsandbytes NF4 is trained on: name "
        "the 16-bit original with --model"
    )


def quantization(load_in_4bit: bool, double_quant: bool, dtype: str) -> "BitsAndBytesConfig | None":
    """Return the NF4 settings of QLoRA (Dettmers et al. 2023, arXiv 2305.14314), or None for
    weights that are not quantised."""
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


def declared_end_ids(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return every token that ends a completion of the model in a folder; see `merge_end_ids`."""
    return merge_end_ids(tokenizer, read_end_ids(folder))


def read_end_ids(folder: Path) -> list[int]:
    """Return the end-of-sequence ids that a model's own files declare."""
    from transformers import GenerationConfig

    try:
        declared = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:
        declared = read_config(folder).get_text_config().eos_token_id
    return [declared] if isinstance(declared, int) else list(declared or [])


def merge_end_ids(
    tokenizer: "PreTrainedTokenizerBase", declared: int | list[int] | None
) -> list[int]:
    """Return every token that ends a completion, each once: the tokenizer's EOS, those that the
    model declares, and the one that the chat template writes after an assistant's turn."""
    declared = [declared] if isinstance(declared, int) else list(declared or [])
    found = [tokenizer.eos_token_id, *declared, find_turn_end(tokenizer)]
    return list(dict.fromkeys(token for token in found if token is not None))


def public_name(folder: Path) -> str:
    """Return the Hub id of a snapshot's folder (`models--owner--name/snapshots/<commit>`), or the
    path of any other folder."""
    if folder.parent.name != "snapshots":
        return str(folder)
    return "/".join(folder.parent.parent.name.split("--")[1:])


def load_base(
    folder: Path, placement: Placement, load_in_4bit: bool, double_quant: bool = True
) -> "PreTrainedModel":
    """Load the base model on one device, its linear layers in NF4 if asked for or stored so.

    A model from the Hub keeps its id as its name, so that adapters name the id and not the folder
    of a cache.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    stored_in_4bit, dtype = is_stored_in_4bit(folder), getattr(torch, placement.dtype)
    settings = {}  # a stored quantization_config must not be replaced by None
    if load_in_4bit and not stored_in_4bit:
        settings["quantization_config"] = quantization(True, double_quant, placement.dtype)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        trust_remote_code=False,
        dtype=dtype,
        device_map={"": placement.device},
        **settings,
    )
    model.name_or_path = model.config._name_or_path = public_name(folder)
    if load_in_4bit or stored_in_4bit:
        keep_4bit_as_stored(model, dtype)
    return model


def keep_4bit_as_stored(model: "PreTrainedModel", dtype: "torch.dtype") -> None:
    """Compute with 4-bit weights in `dtype`, whatever type is stored with them, and keep
    bitsandbytes from repacking them on a CPU with AVX512-BF16 when the model first generates.

    Repacked weights compute in bfloat16, so other numbers than in training, and cannot be trained.
    """
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
            layer.compute_dtype, layer.compute_type_is_set = dtype, True
            layer.weight.quant_state.dtype = dtype


def load_adapter(base: "PreTrainedModel", directory: Path) -> "PeftModel":
    """Put a saved adapter on its base, for inference; if the adapter was trained with a larger
    vocabulary, the base's embeddings get as many rows first."""
    from peft import PeftModel

    rows = saved_vocabulary(directory)
    if rows is not None and rows != base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(rows, mean_resizing=False)
    return PeftModel.from_pretrained(base, directory)


def saved_vocabulary(directory: Path) -> int | None:
    """Return the number of tokens in the embeddings that an adapter holds, None if it has none."""
    from safetensors import safe_open

    if not (directory / "adapter_model.safetensors").is_file():
        return None
    with safe_open(directory / "adapter_model.safetensors", "pt") as file:
        names = [name for name in file.keys() if WHOLE_EMBEDDING.search(name)]  # noqa: SIM118
        return file.get_slice(names[0]).get_shape()[0] if names else None


def write_dequantised(model: "PreTrainedModel", source: Path, folder: Path) -> Path:
    """Write the dequantised weights of a 4-bit model as a plain model folder; return the folder."""
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
    vars(config).pop("quantization_config", None)  # whole weights are written
    config.dtype = next(iter(weights.values())).dtype
    config.save_pretrained(folder)
    return folder
