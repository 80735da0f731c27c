"""vLLM on a 4-bit base beside PEFT's policy on the same base: what each says and holds, as JSON.

    python tests/gpu/sync_worker.py MODEL_FOLDER OUTPUT.json [DTYPE]

Distances are of log-probs in nats, the engine's from those of a plain forward pass of the policy:
after a sync, after sleeping and waking without one, after ten syncs, and of the bare base.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from lora_grpo.machine.backend import Choice, claim

claim(Choice("transformers", "vllm", "", ""))  # before torch is imported

import torch  # noqa: E402
from peft import PeftModel, get_peft_model  # noqa: E402

from lora_grpo.config.train_config import TrainConfig  # noqa: E402
from lora_grpo.data.problems import load_problems  # noqa: E402
from lora_grpo.data.prompt import build_messages, render  # noqa: E402
from lora_grpo.grpo.settings import lora_config  # noqa: E402
from lora_grpo.policy import base as bases  # noqa: E402
from lora_grpo.policy.vllm import Engine, EngineSettings, open_engine  # noqa: E402

PROMPTS, TOKENS, SYNCS, NAPS = 8, 32, 10, 5
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_tokens": TOKENS}


def stir(model: PeftModel) -> None:
    """Change what the adapter says."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def distance(model: Any, prompts: list[list[int]], drawn: tuple[list, list]) -> dict[str, float]:
    """Return mean, 99th percentile and largest of |engine - policy| over the sampled tokens'
    log-probs."""
    found = []
    for prompt, ids, logprobs in zip(prompts, *drawn, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids], device=model.device)).logits[0].float()
        own = logits.log_softmax(-1)[len(prompt) - 1 : -1].cpu()  # (T, V)
        own = own[torch.arange(len(ids)), torch.tensor(ids)]  # (T,)
        found.append((own - torch.tensor(logprobs)).abs())
    values = torch.cat(found)
    named = {"mean": values.mean(), "p99": values.quantile(0.99), "max": values.max()}
    return {name: value.item() for name, value in named.items()}


def digest(model: torch.nn.Module) -> str:
    """Return the SHA-256 of every base weight and of the scales that a 4-bit one is read with."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            continue
        states = getattr(parameter, "bnb_quant_state", None) or {}  # vLLM's, by shard
        states = list(states.values()) if isinstance(states, dict) else [states]
        own = getattr(parameter, "quant_state", None)  # bitsandbytes' own
        scales = [state.absmax for state in [*states, *([own] if own else [])]]
        found.update(name.encode())
        for tensor in (parameter, *scales):
            plain = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
            found.update(plain.numpy().tobytes())
    return found.hexdigest()


def hash_engine(engine: Engine) -> str:
    """Return the digest of vLLM's base weights; asleep it holds none."""
    with engine.awake():
        return engine.llm.apply_model(digest)[0]


def examine(engine: Engine, model: PeftModel, prompts: list[list[int]]) -> dict[str, Any]:
    """Sync, sleep, wake and sample; return distances and digests."""
    found: dict[str, Any] = {}

    def sample(seed: int = 1) -> tuple[list, list]:
        return engine.sample(prompts, seed=seed, **SAMPLING)

    with model.disable_adapter():
        found["bare_base"] = distance(model, prompts, sample())
    found["before"] = [hash_engine(engine), digest(model)]
    engine.sync(model)
    first = sample()
    found["after_a_sync"] = distance(model, prompts, first)
    with model.disable_adapter():
        found["adapter_moves"] = distance(model, prompts, first)
    for _ in range(NAPS):
        with engine.awake():
            pass
    after_naps = sample()
    found["after_naps"] = distance(model, prompts, after_naps)
    found["same_draw_after_naps"] = after_naps[0] == first[0]
    found["after_syncs"] = []
    for number in range(SYNCS):
        stir(model)
        engine.sync(model)
        found["after_syncs"].append(distance(model, prompts, sample(number)))
    found["after"] = [hash_engine(engine), digest(model)]
    engine.request = None
    with model.disable_adapter():
        found["bare_base_afterwards"] = distance(model, prompts, sample())
    return found


def main(model: str, output: str, dtype: str | None = None) -> None:
    folder, placement = bases.resolve_model(model), bases.choose_placement(dtype)
    tokenizer = bases.load_tokenizer(folder)
    problems = load_problems("arithmetic", "test")[:PROMPTS]
    texts = [render(tokenizer, build_messages(problem.question)) for problem in problems]
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    longest = max(map(len, prompts)) + TOKENS
    share = 0.3 if placement.device == "cuda" else None
    settings = EngineSettings(placement, longest, PROMPTS, 16, True, share)
    base = bases.load_base(folder, placement, load_in_4bit=True)
    ends = bases.declared_end_ids(folder, tokenizer)
    with open_engine(folder, settings, ends, base) as engine:
        torch.manual_seed(0)
        adapted = get_peft_model(base, lora_config(TrainConfig()))
        stir(adapted)
        adapted.eval()
        found = {"dtype": placement.dtype, **examine(engine, adapted, prompts)}
    Path(output).write_text(json.dumps(found, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
