"""Small random models and adapters that the tests of the merge share."""

import dataclasses
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_grpo.dev.tiny_model import PretrainConfig, build_model, train_tokenizer
from lora_grpo.merge.inputs import plan_merge
from lora_grpo.merge.write import write_side_files, write_weights
from lora_grpo.policy.adapter import hash_weights

# A second thread only waits for the first on a busy machine.
torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


SPACE = tempfile.TemporaryDirectory(prefix="merge-models-")


def fresh_folder() -> Path:
    """Return a new folder that lasts as long as the tests."""
    return Path(tempfile.mkdtemp(dir=SPACE.name))


@functools.cache
def make_tokenizer():
    return train_tokenizer(0)


@functools.cache
def make_base(dtype: str = "bfloat16", tied: bool = True, sharded: bool = False) -> Path:
    """Return the folder of a small random model, which is not to be changed."""
    folder = fresh_folder()
    config = PretrainConfig(hidden_size=64, num_hidden_layers=2, intermediate_size=128)
    model = build_model(config, make_tokenizer())
    if not tied:
        model = type(model)(dataclasses.replace(model.config, tie_word_embeddings=False))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.02)
    size = {"max_shard_size": "100KB"} if sharded else {}
    model.to(getattr(torch, dtype)).save_pretrained(folder, **size)
    make_tokenizer().save_pretrained(folder)
    (folder / "LICENSE").write_text("Apache-2.0")
    return folder


def save_adapter(folder: Path, base: Path, std: float = 0.02, **settings) -> Path:
    """Save a random adapter of a base, its B drawn too."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **settings}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    wrapped.save_pretrained(folder)
    return folder


def write_train_config(adapter: Path, base: Path, **values) -> None:
    known = {"model": str(base), "revision": None, "base_sha256": hash_weights(base)}
    (adapter / "train_config.json").write_text(json.dumps({**known, **values}))


@functools.cache
def make_standard_adapter() -> Path:
    return save_adapter(fresh_folder() / "run", make_base())


def make_adapter(**trained) -> Path:
    """Return a copy of the standard adapter that may be changed; `trained` goes into its record."""
    folder = fresh_folder() / "run"
    shutil.copytree(make_standard_adapter(), folder)
    make_tokenizer().save_pretrained(folder)
    if trained:
        write_train_config(folder, make_base(), **trained)
    return folder


def merge_only(adapter: Path, folder: Path, **settings):
    """Merge without the proof; return the plan."""
    plan = plan_merge(adapter, **settings)
    folder.mkdir()
    write_weights(plan, folder)
    write_side_files(plan, folder)
    return plan


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def change_tensor(folder: Path, name: str, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
