"""What stands in for unsloth and vllm where neither can be imported: the same names and signatures,
and the tiny model behind them."""

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from lora_grpo.config.train_config import TrainConfig

# What unsloth's functions take, as far as this project may give it.
FOR_LOADING = {
    *("model_name", "max_seq_length", "dtype", "load_in_4bit", "use_gradient_checkpointing"),
    *("use_exact_model_name", "local_files_only", "fast_inference", "gpu_memory_utilization"),
    *("max_lora_rank", "max_num_seqs"),
}
FOR_LORA = {
    *("r", "target_modules", "lora_alpha", "lora_dropout", "random_state"),
    *("use_gradient_checkpointing", "use_rslora", "init_lora_weights"),
}


class Engine:
    """vLLM on the model's own weights, one greedy answer at a time."""

    def __init__(self, model: Any, max_model_len: int) -> None:
        self.model, self.approx_max_num_seqs = model, 1
        self.requests: list[Any] = []
        self.stops: set[int] = set()
        self.calls: list[str] = []
        settings = SimpleNamespace(max_model_len=max_model_len, enable_sleep_mode=True)
        self.llm_engine = SimpleNamespace(
            vllm_config=SimpleNamespace(model_config=settings),
            output_processor=SimpleNamespace(request_states={"7": None}),
            abort_request=lambda ids, internal: self.calls.append(f"abort {ids} {internal}"),
        )

    def sleep(self, level: int = 1) -> None:
        self.calls.append(f"sleep {level}")

    def generate(
        self,
        prompts: list[dict[str, list[int]]],
        sampling_params: Any,
        *,
        use_tqdm: bool = True,
        lora_request: Any = None,
    ) -> list[Any]:
        self.calls.append("generate")
        self.requests.append(lora_request)
        self.stops |= set(sampling_params.stop_token_ids)
        assert sampling_params.temperature == 0.0 and not use_tqdm
        return [self.answer(prompt["prompt_token_ids"], sampling_params) for prompt in prompts]

    def answer(self, ids: list[int], params: Any) -> Any:
        with torch.no_grad():
            output = self.model.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=params.max_tokens,
                do_sample=False,
                eos_token_id=params.stop_token_ids,
                pad_token_id=params.stop_token_ids[0],
            )
        row = output[0, len(ids) :].tolist()
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(row))])


class FastLanguageModel:
    """Keeps what it is called with; `room` is what vLLM's sequences are shortened to."""

    given: dict[str, Any]
    lora: dict[str, Any]
    pad_token: str
    room: int | None

    @staticmethod
    def from_pretrained(**given: Any) -> tuple[Any, Any]:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        assert given.keys() <= FOR_LOADING
        FastLanguageModel.given = {"revision": None, "token": None, "fast_inference": False}
        FastLanguageModel.given |= {"gpu_memory_utilization": 0.5}
        FastLanguageModel.given |= given
        model = AutoModelForCausalLM.from_pretrained(given["model_name"], dtype=torch.float32)
        model.generation_config.eos_token_id = model.config.eos_token_id
        patched = AutoTokenizer.from_pretrained(given["model_name"])
        patched.pad_token = FastLanguageModel.pad_token
        if given.get("fast_inference"):
            model.vllm_engine = Engine(model, FastLanguageModel.room or given["max_seq_length"])
        return model, patched

    @staticmethod
    def get_peft_model(model: Any, **given: Any) -> Any:
        from peft import LoraConfig, get_peft_model

        assert given.keys() <= FOR_LORA
        FastLanguageModel.lora = {"bias": "none"} | given
        settings = {
            name: value
            for name, value in given.items()
            if name in inspect.signature(LoraConfig).parameters
        }
        torch.manual_seed(given["random_state"])
        wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
        wrapped.modes = []
        wrapped.for_inference = lambda: wrapped.modes.append("inference")
        wrapped.for_training = lambda: wrapped.modes.append("training")
        if hasattr(model, "vllm_engine"):
            wrapped.vllm_engine, wrapped.load_lora = model.vllm_engine, load_lora
        return wrapped


def folder_with_ends(source: Path, target: Path, ends: list[int]) -> Path:
    """Return a model folder whose generation_config.json names these ends of a turn."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.name != "generation_config.json":
            (target / file.name).symlink_to(file)
    text = json.dumps({"eos_token_id": ends, "_from_model_config": False})
    (target / "generation_config.json").write_text(text, encoding="utf-8")
    return target


def load_lora(name: str, load_tensors: bool = False, lora_request_id: int | None = None) -> Any:
    """As unsloth_zoo's, which writes the adapter's settings under this name."""
    Path(name).mkdir(exist_ok=True)
    (Path(name) / "adapter_config.json").write_text("{}", encoding="utf-8")
    return SimpleNamespace(name=name, load_tensors=load_tensors)


def stand_in(monkeypatch: pytest.MonkeyPatch, pad_token: str = "<|endoftext|>") -> list[Any]:
    """Put the modules in their places; return the engines that were deleted."""
    deleted: list[Any] = []

    def module(name: str, **values: Callable | type) -> None:
        made = ModuleType(name)
        vars(made).update(values)
        monkeypatch.setitem(sys.modules, name, made)

    FastLanguageModel.pad_token, FastLanguageModel.room = pad_token, None
    module("unsloth", FastLanguageModel=FastLanguageModel)
    module("unsloth_zoo")
    module("unsloth_zoo.vllm_utils", delete_vllm=deleted.append)
    module("vllm", SamplingParams=SimpleNamespace)
    return deleted


CONFIG = TrainConfig(
    model="tiny",
    seed=11,
    dtype="bfloat16",
    rollout="vllm",
    max_prompt_length=100,
    max_completion_length=28,
    r=6,
    lora_alpha=12,
    lora_dropout=0.25,
    target_modules=("q_proj", "down_proj"),
    use_rslora=True,
    init_lora_weights="gaussian",
    per_device_train_batch_size=8,
    gradient_accumulation_steps=4,
    gradient_checkpointing=True,
)
