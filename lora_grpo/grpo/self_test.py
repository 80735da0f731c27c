"""The start-up self-test: whether packed rows give what TRL's own update gives, on this model.

A small batch of two groups goes through both. This takes the place of lists of model families: it
also decides for models that nobody listed and for later TRLs.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch

from lora_grpo.grpo.batch import StepState
from lora_grpo.grpo.groups import masked_lists
from lora_grpo.grpo.packed_update import computing_packed
from lora_grpo.machine.out_of_memory import is_out_of_memory
from lora_grpo.policy.sampling import decode

if TYPE_CHECKING:
    from trl import GRPOTrainer

# Relative. In 16 bits TRL's own results change by up to 0.7 % (log-probs) and 9 % (gradients) when
# the same rows get three more tokens of padding; what does not fit a model is wrong by about 100 %.
TOLERANCE = 1e-3
TOLERANCES_16_BIT = {"log-probs": 5e-2, "gradients": 2.5e-1, "sampling": 5e-2}
PROMPTS, COMPLETIONS = (3, 3, 6, 6), (5, 1, 2, 4)  # tokens
NOISE = 0.05  # what is added to the adapter: a fresh one changes nothing, so it would not be tested
# What a model raises that does not take packed rows.
REFUSALS = (TypeError, ValueError, AttributeError, LookupError, RuntimeError)


def why_not_packed(trainer: "GRPOTrainer") -> str | None:
    """Return why the update must be TRL's own, or None where the packed one equals it.

    The log-probs, the adapter's gradients and the logits of sampling are compared. Weights,
    gradients, random numbers, modes and the trainer's state are as before when this returns.
    """
    model = trainer.inner_model()
    if trainer.aux_loss_enabled:
        return "the loss has a term for the balance of the experts"
    # A short batch cannot show what differs only beyond a window.
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if kinds - {"full_attention"}:
        return f"its layers attend by {', '.join(sorted(kinds - {'full_attention'}))}"
    with without_a_trace(trainer):
        batch = small_batch(model)
        expected = update(trainer, batch, packed=False)
        try:
            found = update(trainer, batch, packed=True)
            found["sampling"], expected["sampling"] = sampled_and_whole(trainer, batch)
        except REFUSALS as error:
            if is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split()) or "no reason given"
            return f"{type(model).__name__} does not compute packed rows ({reason})"
    halves = {torch.bfloat16, torch.float16} & {p.dtype for p in trainer.model.parameters()}
    in_16_bit = bool(halves) or trainer.accelerator.mixed_precision in ("bf16", "fp16")
    return what_differs(found, expected, in_16_bit)


def what_differs(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], in_16_bit: bool
) -> str | None:
    """Return a sentence about what differs by more than rounding can explain, or None."""
    for name, theirs in expected.items():
        difference = ((found[name] - theirs).norm() / theirs.norm()).item()
        tolerance = TOLERANCES_16_BIT[name] if in_16_bit else TOLERANCE
        if not difference <= tolerance:  # also where it is not a number
            return f"its {name} differ by {difference:.1e}, more than {tolerance:g}"
    return None


def small_batch(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return two groups of two completions as TRL pads them, of the same tokens every time."""
    draw = torch.Generator().manual_seed(0)
    rows, width, length = len(PROMPTS), max(PROMPTS), max(COMPLETIONS)
    words = model.get_input_embeddings().num_embeddings
    # The ends of a vocabulary are often special tokens.
    ids = torch.randint(words // 10, words * 9 // 10, (rows, width + length), generator=draw)
    ids[1::2, :width] = ids[::2, :width]
    places, prompts = torch.arange(width + length), torch.tensor(PROMPTS)[:, None]
    mask = (places >= width - prompts) & (places < width + torch.tensor(COMPLETIONS)[:, None])
    batch = {
        "ids": ids * mask,
        "mask": mask.long(),
        "completion_mask": mask[:, width:].long(),
        "advantages": torch.ones(rows),
        "weights": torch.randn(rows, length, generator=draw) * mask[:, width:],
    }
    return {name: value.to(model.device) for name, value in batch.items()}


def update(
    trainer: "GRPOTrainer", batch: dict[str, torch.Tensor], packed: bool
) -> dict[str, torch.Tensor]:
    """Return the completions' log-probs and the gradients of their weighted sum with respect to
    the adapter, computed packed or by TRL."""
    trainer.packed, trainer.step.inputs = packed, batch
    length = batch["completion_mask"].shape[1]
    with computing_packed(trainer.inner_model()) if packed else nullcontext(), torch.enable_grad():
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, batch["ids"], batch["mask"], length, compute_entropy=True
        )
        total = (logps * batch["weights"]).sum()
        if trainer.entropy_coef != 0:
            total = total + (entropies * batch["completion_mask"]).sum()
        gradients = torch.autograd.grad(total, trainer.trained, allow_unused=True)
    counted = batch["completion_mask"].bool()
    parts = [
        torch.zeros_like(parameter) if gradient is None else gradient
        for parameter, gradient in zip(trainer.trained, gradients, strict=True)
    ]
    whole = torch.cat([part.float().flatten() for part in parts])
    return {"log-probs": logps.detach()[counted], "gradients": whole}


@torch.no_grad()
def sampled_and_whole(
    trainer: "GRPOTrainer", batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of the completions' tokens as sampling computes them, one token at a time
    on shared prompts, and as one pass over the padded rows does."""
    model, length = trainer.inner_model(), max(COMPLETIONS)
    ids, mask = batch["ids"], batch["mask"]
    prompts = masked_lists(ids[:, :-length], mask[:, :-length])
    steps: list[torch.Tensor] = []

    def follow(logits: torch.Tensor) -> torch.Tensor:
        steps.append(logits)
        return ids[:, len(steps) - length - 1]

    with trainer.accelerator.autocast():
        decode(model, prompts, follow, [-1], length)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        whole = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits[:, -length - 1 : -1]
    counted = batch["completion_mask"].bool()
    return torch.stack(steps, 1)[counted].float(), whole[counted].float()


@contextmanager
def without_a_trace(trainer: "GRPOTrainer") -> Iterator[None]:
    """Train without dropout and with a noisy adapter in the block; then restore everything."""
    model, device = trainer.model, trainer.model.device
    modes = {module: module.training for module in model.modules()}
    weights = [parameter.data for parameter in trainer.trained]
    step, packed = trainer.step, trainer.packed
    draw = torch.Generator().manual_seed(0)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            model.train()
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.eval()
            for parameter in trainer.trained:
                noise = NOISE * torch.randn(parameter.shape, generator=draw)
                parameter.data = parameter.data + noise.to(parameter.device)
            trainer.step = StepState()
            yield
        finally:
            trainer.step, trainer.packed = step, packed
            for parameter, data in zip(trainer.trained, weights, strict=True):
                parameter.data = data
            for module, training in modes.items():
                module.training = training
