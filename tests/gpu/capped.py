"""A training run on a card made small, and the most that it held there, as JSON.

    python tests/gpu/capped.py 8 OUTPUT.json --preset qwen2.5-0.5b --model FOLDER --gpu-memory 8

The rest of the card is held by another process, so that 8 GB are all there is, and the card's own
count says what was used: PyTorch's counts what a sleeping vLLM has given back as still held. For
the same reason PyTorch's own cap, set beside it, leaves room for vLLM's share.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

GIB = 2**30
EVERY = 0.02  # seconds
CONTEXT = GIB  # what the holding process itself may take
HOLD = """
import sys, torch
free, total = torch.cuda.mem_get_info()
take = free - int(sys.argv[1])
if take < 0:
    sys.exit(f"only {free} bytes are free")
held = torch.empty(take, dtype=torch.uint8, device="cuda")
print(torch.cuda.mem_get_info()[0], flush=True)
sys.stdin.read()
"""


@contextmanager
def small_card(size: int) -> Iterator[int]:
    """Hold all but `size` bytes of the card while the block runs; yield what is free.

    A card that has no more than that free is left as it is.
    """
    from lora_grpo.machine.hardware import find_gpu

    free = find_gpu().free_bytes
    if free <= size + CONTEXT:
        yield free
        return
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        line = holder.stdout.readline().strip()
        if not line:
            raise RuntimeError("the rest of the card could not be held, see above")
        yield int(line)
    finally:
        holder.stdin.close()
        holder.wait(60)


class Watch(threading.Thread):
    """Reads what is free on the card many times a second, and keeps the least."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.least, self.over = None, threading.Event()

    def run(self) -> None:
        import torch

        while not self.over.is_set():
            free = torch.cuda.mem_get_info()[0]
            self.least = free if self.least is None else min(free, self.least)
            time.sleep(EVERY)


def train(size: int, free: int, arguments: list[str]) -> tuple[int, dict]:
    """Make the run; return its exit status and what was planned and held."""
    from lora_grpo.config.presets import parse_train_config
    from lora_grpo.train.command import run_plan
    from lora_grpo.train.console import Display
    from lora_grpo.train.plan import make_plan

    config, _ = parse_train_config(arguments)
    plan = make_plan(config)  # claims the backend before torch is imported
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    share = plan.config.vllm_gpu_memory_utilization if plan.config.rollout == "vllm" else 0
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / total + (share or 0)))
    watch = Watch()
    watch.start()
    status = run_plan(plan, Display())
    watch.over.set()
    watch.join()
    return status, {
        "gigabytes": size / GIB,
        "backend": plan.config.backend,
        "rollout": plan.config.rollout,
        "settings": plan.memory.settings,
        "vllm_share": share,
        "predicted_bytes": plan.memory.peak_bytes,
        "peak_phase": plan.memory.prediction.fullest.name,
        "measured_bytes": free - watch.least,
        "reserved_by_pytorch_bytes": torch.cuda.max_memory_reserved(),
        "run_dir": str(plan.run_dir),
    }


def main() -> int:
    size, output, *arguments = sys.argv[1:]
    with small_card(int(float(size) * GIB)) as free:
        status, found = train(int(float(size) * GIB), free, arguments)
    Path(output).write_text(json.dumps(found, indent=2), encoding="utf-8")
    print(json.dumps(found))
    return status


if __name__ == "__main__":
    sys.exit(main())
