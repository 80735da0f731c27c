"""A TRL whose methods have moved is refused by name."""

import pytest
from trl import GRPOTrainer

from lora_grpo.grpo.seams import CHECKED_WITH, SEAMS, check_seams, moved_seams
from lora_grpo.grpo.trainer import LoraGRPOTrainer


def test_the_installed_trl_is_the_one_that_was_read() -> None:
    assert moved_seams(GRPOTrainer) == []


def test_every_overridden_method_of_trl_is_named() -> None:
    ours = [kind for kind in LoraGRPOTrainer.__mro__ if kind.__module__.startswith("lora_grpo")]
    overridden = {name for kind in ours for name in vars(kind) if hasattr(GRPOTrainer, name)}
    dunder = {name for name in overridden if name.startswith("__")}
    assert overridden - dunder - {"_abc_impl", "_parameters"} == set(SEAMS)


def test_a_moved_method_stops_the_start() -> None:
    class Later(GRPOTrainer):
        _generate = None

        def compute_loss(self, model, batch):
            return None

    with pytest.raises(RuntimeError, match=rf"no _generate; compute_loss.*trl=={CHECKED_WITH}"):
        check_seams(Later)
