"""Made-up adapter directories for report.html: the records of a run, without weights."""

import json
from pathlib import Path
from typing import Any

from lora_grpo.data.problems import Problem
from lora_grpo.machine.files import write_json, write_jsonl
from lora_grpo.results.scoring import Item, build_eval_items, build_evaluation

RIGHT = "<reasoning>\n1+1=2\n</reasoning>\n<answer>\n2\n</answer>"
WRONG = "it is 3"
REWARDS = ((1.0, 0.2), (0.0, 0.0), (1.0, 0.0), (0.0, None))


def metrics_row(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "reward": step / 100,
        "rewards": {"correctness": step / 120, "format": 0.1},
        **{"correct": 0.5, "format": 0.25, "completion_length": 30.0, "clipped_ratio": 0.25},
        **{"frac_reward_zero_std": 0.5, "grad_norm": 0.1, "learning_rate": 1e-5, "kl": None},
        **{"seconds": 6.0, "seconds_generate": 4.0, "seconds_update": 2.0},
        **{"peak_memory_bytes": 2**30, "predicted_memory_bytes": 2**31},
    }


def completion_rows(step: int, question: str, texts: list[str]) -> list[dict[str, Any]]:
    """Return a group of four: two right, two wrong; the last one was cut off."""
    return [
        {
            "step": step,
            "question": question,
            "answer": "2",
            "completion": text,
            "tokens": 10 + at,
            "truncated": at == 3,
            "rewards": {"correctness": REWARDS[at][0], "format": REWARDS[at][1]},
        }
        for at, text in enumerate(texts)
    ]


def write_run(
    folder: Path,
    steps: int = 6,
    every: int = 2,
    texts: tuple[str, ...] = (RIGHT, WRONG, "<answer>2</answer>", WRONG),
    question: str = "What is 1 + 1?",
    items: int = 8,
    gained: int = 7,
    lost: int = 0,
    evaluated: bool = True,
    **trained: Any,
) -> Path:
    """Write a run that logged a group of four completions at every `every` steps, and whose adapter
    answers `gained` test problems that its base does not, and the other way round."""
    folder.mkdir(parents=True)
    record = {"num_generations": 4, "scale_rewards": "group", "steps": steps, "r": 8}
    record |= {"model": "tiny", "dataset": "arithmetic", "max_completion_length": 64}
    write_json(folder / "train_config.json", record | trained)
    write_jsonl(folder / "metrics.jsonl", [metrics_row(step) for step in range(1, steps + 1)])
    logged = range(every, steps + 1, every)
    groups = [completion_rows(step, f"{question} {step}", list(texts)) for step in logged]
    write_jsonl(folder / "completions.jsonl", [row for group in groups for row in group])
    validated = {"step": steps, "num_items": 64, "strict_accuracy": 0.75, "format_rate": 0.5}
    write_jsonl(folder / "validation.jsonl", [validated | {"ci95": [0.6, 0.8]}])
    if evaluated:
        right = Item(texts[0][:3000], True, True, True, False, 9)
        wrong = Item(texts[1][:3000], False, False, False, False, 5)
        base = [wrong if at < gained else right for at in range(items)]
        adapter = [wrong if gained <= at < gained + lost else right for at in range(items)]
        models = {"base": base, "adapter": adapter}
        found = build_evaluation("arithmetic", "test", models)
        write_json(folder / "eval.json", found | {"best_step": steps, "steps": steps})
        problems = [Problem(at, f"{question} no. {at}", "2") for at in range(items)]
        write_jsonl(folder / "eval_items.jsonl", build_eval_items(problems, models))
    return folder


def page_data(path: Path) -> dict[str, Any]:
    """Return the data that a page holds."""
    text = path.read_text(encoding="utf-8").partition('id="data">')[2]
    return json.loads(text.partition("</script>")[0])
