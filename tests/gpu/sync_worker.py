"""vLLM on a 4-bit base beside PEFT's policy on the same base: what each says and holds, as JSON.

    python tests/gpu/sync_worker.py MODEL_FOLDER OUTPUT.json [--dtype float16]

Distances are of log-probs in nats, the engine's from those of a plain forward pass of the policy:
after a sync, after sleeping and waking without one, after ten syncs, and of the bare base.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from lora_grpo.policy.vllm import Engine

PROMPTS, TOKENS, SYNCS, NAPS = 8, 32, 10, 5
STIR = 0.1
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_tokens": TOKENS}
Drawn = tuple[list[list[int]], list[list[float]]]


def stir(model: "PeftModel") -> None:
    """Change what the adapter says."""
    import torch

    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=STIR)


def differences(model: Any, prompts: list[list[int]], drawn: Drawn) -> "torch.Tensor":
    """Return |engine - policy| of every sampled token's log-prob, in nats, as (tokens,)."""
    import torch

    found, device = [], model.device
    for prompt, ids, logprobs in zip(prompts, *drawn, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids], device=device)).logits[0].float()
        own = logits.log_softmax(-1)[len(prompt) - 1 : -1]  # (T, V)
        own = own.gather(1, torch.tensor(ids, device=device)[:, None])[:, 0].cpu()  # (T,)
        found.append((own - torch.tensor(logprobs)).abs())
    return torch.cat(found)


def summary(values: "torch.Tensor") -> dict[str, float]:
    """Return mean, 99th percentile and largest."""
    return {
        "mean": values.mean().item(),
        "p99": values.quantile(0.99).item(),
        "max": values.max().item(),
    }


def tensors_of(model: "torch.nn.Module") -> Iterator[tuple[str, "torch.Tensor"]]:
    """Yield every base weight, and the scales that a 4-bit one is read with."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            continue
        yield name, parameter
        states = getattr(parameter, "bnb_quant_state", None) or {}  # vLLM's, by shard
        own = getattr(parameter, "quant_state", None)  # bitsandbytes' own
        named = states.items() if isinstance(states, dict) else enumerate([states])
        for key, state in [*named, *([("own", own)] if own is not None else [])]:
            yield f"{name}.{key}", state.absmax


def digest(tensors: Iterable[tuple[str, "torch.Tensor"]]) -> str:
    """Return the SHA-256 of names and bytes."""
    import torch

    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(name.encode())
        plain = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
        found.update(plain.numpy().tobytes())
    return found.hexdigest()


def digest_of(model: "torch.nn.Module") -> str:
    """Return the digest of a model's base weights."""
    return digest(tensors_of(model))


def hash_engine(engine: "Engine") -> str:
    """Return the digest of vLLM's base weights; asleep it holds none."""
    with engine.awake():
        return engine.llm.apply_model(digest_of)[0]


def examine(engine: "Engine", model: "PeftModel", prompts: list[list[int]]) -> dict[str, Any]:
    """Sync, sleep, wake and sample; return distances and digests."""
    found: dict[str, Any] = {"base": {}, "engine": {}}

    def distance(seed: int = 1) -> dict[str, float]:
        return summary(differences(model, prompts, engine.sample(prompts, seed=seed, **SAMPLING)))

    with model.disable_adapter():
        found["bare_base"] = distance()
    found["engine"]["before"], found["base"]["before"] = hash_engine(engine), digest_of(model)
    engine.sync(model)
    first = engine.sample(prompts, seed=1, **SAMPLING)
    found["after_a_sync"] = summary(differences(model, prompts, first))
    with model.disable_adapter():
        found["adapter_moves"] = summary(differences(model, prompts, first))
    for _ in range(NAPS):
        with engine.awake():
            pass
    found["after_naps"] = distance()
    found["same_draw_after_naps"] = engine.sample(prompts, seed=1, **SAMPLING)[0] == first[0]
    found["after_syncs"] = []
    for number in range(SYNCS):
        stir(model)
        engine.sync(model)
        found["after_syncs"].append(distance(number))
    found["engine"]["after"], found["base"]["after"] = hash_engine(engine), digest_of(model)
    engine.request = None
    with model.disable_adapter():
        found["bare_base_afterwards"] = distance()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--dtype")
    asked = parser.parse_args()
    from lora_grpo.machine.backend import Choice, claim

    claim(Choice("transformers", "vllm", "", ""))
    import torch
    from peft import get_peft_model

    from lora_grpo.config.train_config import TrainConfig
    from lora_grpo.data.problems import load_problems
    from lora_grpo.data.prompt import build_messages, render
    from lora_grpo.grpo.settings import lora_config
    from lora_grpo.policy.base import (
        choose_placement,
        declared_end_ids,
        load_base,
        load_tokenizer,
        resolve_model,
    )
    from lora_grpo.policy.vllm import EngineSettings, open_engine

    folder, placement = resolve_model(asked.model), choose_placement(asked.dtype)
    tokenizer = load_tokenizer(folder)
    problems = load_problems("arithmetic", "test")[:PROMPTS]
    texts = [render(tokenizer, build_messages(problem.question)) for problem in problems]
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    longest = max(map(len, prompts)) + TOKENS
    share = 0.3 if placement.device == "cuda" else None
    settings = EngineSettings(placement, longest, PROMPTS, 16, True, share)
    base = load_base(folder, placement, load_in_4bit=True)
    with open_engine(folder, settings, declared_end_ids(folder, tokenizer), base) as engine:
        torch.manual_seed(0)
        model = get_peft_model(base, lora_config(TrainConfig()))
        stir(model)
        model.eval()
        found = {"dtype": placement.dtype, **examine(engine, model, prompts)}
    asked.output.write_text(json.dumps(found, indent=2), encoding="utf-8")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
