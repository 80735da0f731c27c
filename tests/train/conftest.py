import multiprocessing

import pytest


@pytest.fixture(scope="module")
def children():
    """Processes that start with everything imported and no thread of torch's running yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["lora_grpo.train.run", "lora_grpo.train.plan", "trl.trainer.grpo_trainer"]
    )
    return context
