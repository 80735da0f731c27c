"""Problems of the right difficulty: a problem that is always or never solved has no advantage.

The policy that GRPO starts from answers each candidate a few times. The results are kept beside the
runs, in a file named by all they depend on: a killed run goes on from there, and another run with
the same model and data reads them. The run keeps its own copy, which decides when it is resumed.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from lora_grpo.data.problems import Problem
from lora_grpo.grpo.groups import Replacements
from lora_grpo.grpo.settings import dataset_rows, order_problems
from lora_grpo.grpo.trainer import LoraGRPOTrainer
from lora_grpo.machine.files import append_jsonl, read_jsonl, write_jsonl
from lora_grpo.policy.adapter import METRICS
from lora_grpo.policy.drawing import Sampling
from lora_grpo.policy.open import Policy
from lora_grpo.results.evaluate import evaluate_model
from lora_grpo.train.console import Display, percent
from lora_grpo.train.plan import Plan

DIFFICULTY = "difficulty.jsonl"
CACHE = ".difficulty"  # in --adapters-dir
AT_ONCE = 16  # problems in a call, whose samples do not depend on the other calls
SAID_EVERY = 4 * AT_ONCE
# What of a run's record decides what is sampled.
DEPENDS_ON = (
    *("base_sha256", "load_in_4bit", "bnb_4bit_use_double_quant", "dtype", "dataset_sha256"),
    *("task", "system_prompt", "example", "max_completion_length", "temperature", "seed"),
    "difficulty_samples",
)


def check_kept(plan: Plan) -> None:
    """Check that a resumed run still knows what it was trained on.

    Raises:
        FileNotFoundError: it has made steps, and its `difficulty.jsonl` is gone.
    """
    path = plan.run_dir / DIFFICULTY
    if plan.config.difficulty_filter and read_jsonl(plan.run_dir / METRICS) and not path.is_file():
        raise FileNotFoundError(
            f"--resume {plan.run_dir}: {path} says which problems the run is trained on, and is "
            "missing: put it back, or start anew"
        )


def hash_start(trainer: LoraGRPOTrainer) -> str | None:
    """Return the hash of the adapter that GRPO starts from, or None if it changes nothing yet."""
    if not any(p.any() for name, p in trainer.model.named_parameters() if "lora_B" in name):
        return None
    digest = hashlib.sha256()
    for parameter in trainer.trained:
        digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def cache_path(plan: Plan, record: dict[str, Any], trainer: LoraGRPOTrainer) -> Path:
    """Return the file of what this model answers to these problems with these settings."""
    key = {name: record.get(name) for name in DEPENDS_ON} | {"start": hash_start(trainer)}
    name = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return plan.run_dir.parent / CACHE / f"{name}.jsonl"


def find_candidates(plan: Plan) -> list[Problem]:
    """Return the problems to sample: the first that a run without the filter would use."""
    return order_problems(plan.data.train, plan.config.difficulty_problems, plan.config.seed)


def sample_part(
    plan: Plan, policy: Policy, problems: Sequence[Problem], first: int
) -> list[dict[str, Any]]:
    """Return the result of each problem; `first` is the number of the first one."""
    config = plan.config
    each, seed = config.difficulty_samples, config.seed * 2**32 + first
    sampling = Sampling(each, config.temperature, seed)
    limit = config.max_completion_length
    style = plan.data.style
    items = evaluate_model(policy, plan.tokenizer, problems, style, limit, sampling=sampling)
    rows = []
    for index, problem in enumerate(problems):
        own = items[index * each : (index + 1) * each]
        rows.append(
            {
                "number": first + index,
                "row": problem.row,
                "samples": each,
                # Tags are soon learnt: what makes a problem hard is its answer.
                "right": sum(item.strict or item.lenient for item in own),
                "in_tags": sum(item.strict for item in own),
                "truncated": sum(item.truncated for item in own),
            }
        )
    return rows


def measure(plan: Plan, policy: Policy, cache: Path, display: Display) -> list[dict[str, Any]]:
    """Return the result of each candidate, sampling those that the cache does not hold yet."""
    candidates, cache_rows = find_candidates(plan), read_jsonl(cache)
    known = {row["number"]: row for row in cache_rows}
    cache.parent.mkdir(exist_ok=True)
    write_jsonl(cache, cache_rows)  # without half a line that a kill may have left
    total, samples = len(candidates), plan.config.difficulty_samples
    there = sum(number in known for number in range(total))
    display.say(
        f"difficulty: {samples} completions for each of {total} problems"
        + (f", {there} of them sampled before" if there else "")
    )
    with display.bar("measuring difficulty", total) as advance:
        advance(there)
        for first in range(0, total, AT_ONCE):
            part = candidates[first : first + AT_ONCE]
            if all(first + index in known for index in range(len(part))):
                continue
            rows = sample_part(plan, policy, part, first)
            new = [row for row in rows if row["number"] not in known]
            append_jsonl(cache, new)
            known |= {row["number"]: row for row in new}
            advance(len(new))
            done = first + len(part)
            if done % SAID_EVERY == 0 and done < total:
                display.say(f"difficulty: {done} of {total} problems sampled")
    return [known[number] for number in range(total)]


def describe_difficulty(rows: Sequence[dict[str, Any]], kept: int) -> str:
    """Return the histogram of how often the problems were solved, and how many are kept."""
    each = rows[0]["samples"]
    counts = Counter(row["right"] for row in rows)
    histogram = ", ".join(f"{right}/{each} {counts[right]}" for right in range(each + 1))
    whole = each * len(rows)
    in_tags, cut = (sum(row[name] for row in rows) / whole for name in ("in_tags", "truncated"))
    return (
        f"difficulty of {len(rows)} problems, by right samples: {histogram}; {kept} are kept, "
        f"{counts[each]} always and {counts[0]} never right ones left out\n"
        f"of the samples {percent(in_tags)} are right between the tags, {percent(cut)} were cut off"
    )


def keep_solvable(plan: Plan, rows: Sequence[dict[str, Any]], display: Display) -> list[Problem]:
    """Return the candidates that were solved at times, in their order.

    Raises:
        ValueError: fewer are left than a step takes.
    """
    pairs = list(zip(find_candidates(plan), rows, strict=True))
    kept = [problem for problem, row in pairs if 0 < row["right"] < row["samples"]]
    said, wanted = describe_difficulty(rows, len(kept)), plan.config.prompts_per_step
    display.say(said)
    if len(kept) < wanted:
        raise ValueError(
            f"--difficulty-filter leaves {len(kept)} problems, fewer than the {wanted} of a step "
            f"({said.splitlines()[0]}): give a larger --difficulty-problems (now {len(rows)}) or "
            "--difficulty-samples, other problems, or a longer --max-completion-length, or leave "
            "the filter out"
        )
    return kept


def train_on_solvable(
    plan: Plan,
    record: dict[str, Any],
    policy: Policy,
    trainer: LoraGRPOTrainer,
    display: Display,
) -> None:
    """Let the trainer draw only problems that its policy solves at times; `policy` has the adapter
    that GRPO starts from.

    Raises:
        ValueError: too few are left.
    """
    config, path = plan.config, plan.run_dir / DIFFICULTY
    if not path.exists():
        write_jsonl(path, measure(plan, policy, cache_path(plan, record, trainer), display))
    rows = read_jsonl(path)
    kept = keep_solvable(plan, rows, display)
    count = math.ceil(plan.steps / config.num_iterations) * config.prompts_per_step
    ordered = order_problems(kept, count, config.seed)
    if config.curriculum:
        right = {row["row"]: row["right"] for row in rows}
        ordered.sort(key=lambda problem: -right[problem.row])
    trainer.train_dataset = Dataset.from_list(dataset_rows(ordered, plan.data.style))
    if trainer.replacements:
        pool = dataset_rows(kept, plan.data.style)
        trainer.replacements = Replacements(pool, config.dynamic_sampling_rounds, config.seed)
