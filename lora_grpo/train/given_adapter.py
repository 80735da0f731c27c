"""The adapter that `--adapter` names: where it lies, and the settings that it decides.

An SFT adapter or an earlier run's goes in; GRPO goes on with its weights, in its shape.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_grpo.config.train_config import TrainConfig, flag
from lora_grpo.machine.files import read_json
from lora_grpo.policy.adapter import (
    CONFIG,
    START,
    TRAIN_CONFIG,
    WEIGHTS,
    check_adapter,
    hash_weights,
    read_header,
    read_record,
)

if TYPE_CHECKING:
    from peft import PeftModel

SHAPE = ("r", "lora_alpha", "target_modules", "use_rslora")
# What a LoRA adapter may have beside two matrices per layer; this trainer makes no such adapter.
EXTRAS = ("modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform", "use_dora")
EXTRAS += ("lora_bias", "fan_in_fan_out", "trainable_token_indices", "target_parameters")
SOURCES = (CONFIG, WEIGHTS, TRAIN_CONFIG)


def find_given(config: TrainConfig, run_dir: Path) -> Path | None:
    """Return the folder of the adapter that the run starts from; None without `--adapter`, and
    where a resumed run keeps it already.

    Raises:
        FileNotFoundError, ValueError: there is no complete adapter by that name.
    """
    if config.adapter is None or (config.resume and (run_dir / START / WEIGHTS).is_file()):
        return None
    folder = Path(config.adapter).expanduser()
    if not folder.is_dir():
        folder = download_adapter(config.adapter)
    return check_adapter(folder, "train_lora.py")


def download_adapter(name: str) -> Path:
    """Return a snapshot of an adapter's repository from the cache or the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(SOURCES)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"--adapter {name} is neither a local folder nor a repository that the Hub gave "
            f"({reason}): give the folder of an adapter, such as adapters/tiny"
        ) from error


def take_shape(config: TrainConfig, given: Path, base: Path) -> TrainConfig:
    """Return the settings with the rank, scale and layers of the given adapter; `base` is the
    folder of the model that is trained.

    Raises:
        ValueError: the adapter is not plain LoRA, a flag asks for another shape, or the adapter
            belongs to another base.
    """
    shape = read_shape(config, read_json(given / CONFIG))
    if config.init_lora_weights is not TrainConfig.init_lora_weights:
        raise ValueError(
            f"--init-lora-weights {config.init_lora_weights} with --adapter {config.adapter}: its "
            "weights are there already: leave it out"
        )
    for name, value in shape.items():
        asked = getattr(config, name)
        if asked not in (value, getattr(TrainConfig, name)):
            raise ValueError(
                f"{flag(name)} {show(asked)} with --adapter {config.adapter}, which has "
                f"{show(value)}: leave it out"
            )
    record = read_record(given)
    if record.base_sha256 and record.base_sha256 != hash_weights(base):
        raise ValueError(
            f"--adapter {config.adapter} was trained on {record.base}, whose weights are not those "
            f"of --model {config.model}: give --model {record.base}"
        )
    return dataclasses.replace(config, **shape)


def read_shape(config: TrainConfig, found: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of SHAPE that an `adapter_config.json` holds."""
    odd = [name for name in EXTRAS if found.get(name)]
    odd += ["bias"] if found.get("bias", "none") != "none" else []
    odd += ["peft_type"] if found.get("peft_type") != "LORA" else []
    modules = found.get("target_modules")
    if not isinstance(modules, list) or any("." in name for name in modules):
        odd.append("target_modules")
    if odd:
        raise ValueError(
            f"--adapter {config.adapter}: its {CONFIG} sets {', '.join(odd)} in a way that is not "
            "plain LoRA on layers named by a list, which alone can be trained further here: merge "
            "it into its base and train on the merged model (--model)"
        )
    return {
        "r": found["r"],
        "lora_alpha": found["lora_alpha"],
        "target_modules": tuple(sorted(modules)),
        "use_rslora": bool(found.get("use_rslora")),
    }


def show(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


def check_fits(config: TrainConfig, given: Path, adapted: "PeftModel") -> None:
    """Raise a ValueError unless the file holds the adapter's tensors, of the same shapes.

    `adapted` is the model with a fresh adapter, on any device, also `meta`.
    """
    from peft import get_peft_model_state_dict

    with (given / WEIGHTS).open("rb") as file:
        held = {key: entry["shape"] for key, entry in read_header(file).items() if key[0] != "_"}
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    wanted = {key: list(tensor.shape) for key, tensor in state.items()}
    wrong = sorted(key for key in wanted.keys() | held.keys() if wanted.get(key) != held.get(key))
    if wrong:
        raise ValueError(
            f"--adapter {config.adapter} does not fit --model {config.model}: {len(wrong)} tensors "
            f"differ in name or shape, such as {wrong[0]} ({held.get(wrong[0])} in the file, "
            f"{wanted.get(wrong[0])} wanted): give the model that it was trained on"
        )
