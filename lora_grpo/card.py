"""The adapter directory's README.md: a model card that says only what the run recorded."""

from pathlib import Path
from typing import Any

from lora_grpo.atomic import write_text

CARD = """\
---
base_model: {base_model}
library_name: peft
pipeline_tag: text-generation
tags:
- grpo
- lora
- trl
---

# {name}

A LoRA adapter for `{base_model}`, trained with GRPO on `{dataset}` by lora-grpo.

## Evaluation

{num_items} problems of `{test}` ({split}), greedy decoding, one sample each, the training prompt.

| | base | adapter |
| --- | ---: | ---: |
{rows}

McNemar's exact test on the same items: p = {p:.2g}. The adapter is that of step {best_step} of
{steps}.

## Use

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{name}")
```

The system prompt that it was trained with:

```text
{system_prompt}
```

## Training

{num_generations} completions a prompt, {completions} completions a step, up to {length} tokens
each; LoRA r {r}, alpha {alpha}; {loss_type}, learning rate {learning_rate:g}; seed {seed}. Every
setting is in `train_config.json`.
"""
ROWS = {
    "strict accuracy": "strict_accuracy",
    "lenient accuracy": "lenient_accuracy",
    "format": "format_rate",
    "truncated": "truncated_rate",
}


def table_rows(base: dict[str, Any], adapter: dict[str, Any]) -> str:
    """Return the evaluation's rows in Markdown."""
    rows = [f"| {label} | {base[key]:.1%} | {adapter[key]:.1%} |" for label, key in ROWS.items()]
    spans = ["{:.1%} to {:.1%}".format(*model["ci95"]) for model in (base, adapter)]
    rows.insert(1, f"| 95 % interval (Wilson) | {spans[0]} | {spans[1]} |")
    return "\n".join(rows)


def write_card(run_dir: Path, record: dict[str, Any], report: dict[str, Any]) -> None:
    """Write README.md from `train_config.json` and `eval.json`."""
    text = CARD.format(
        base_model=record["base_model"],
        name=run_dir.name,
        dataset=record["dataset"],
        num_items=report["num_items"],
        test=report["dataset"],
        split=report["split"],
        rows=table_rows(report["base"], report["adapter"]),
        p=report["mcnemar_p"],
        best_step=report["best_step"],
        steps=record["steps"],
        system_prompt=record["system_prompt"],
        num_generations=record["num_generations"],
        completions=record["per_device_train_batch_size"] * record["gradient_accumulation_steps"],
        length=record["max_completion_length"],
        r=record["r"],
        alpha=record["lora_alpha"],
        loss_type=record["loss_type"],
        learning_rate=record["learning_rate"],
        seed=record["seed"],
    )
    write_text(run_dir / "README.md", text)
