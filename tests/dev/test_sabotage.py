"""Each rule of the diagnosis has a sabotaged run, or a reason why none can show it."""

from pathlib import Path

import pytest

from lora_grpo.config.presets import parse_train_config
from lora_grpo.dev.sabotage import UNSHOWN, sabotages, write_inputs
from lora_grpo.diagnosis.rules import RULES
from lora_grpo.rewards.builtin import build_rewards

NAMES = sabotages(Path("there"))


def test_each_rule_has_a_run_or_a_reason() -> None:
    shown = {rule for rule, _ in NAMES.values()}
    assert not shown & UNSHOWN.keys()
    assert shown | UNSHOWN.keys() == {rule.__name__ for rule in RULES}


@pytest.mark.parametrize("name", NAMES)
def test_a_sabotages_flags_and_inputs_are_accepted(name: str, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    _, flags = sabotages(tmp_path)[name]
    config, _ = parse_train_config(["--preset", "tiny", *map(str, flags)])
    assert build_rewards(config.reward_set, config.reward)
    given = (config.dataset, config.system_prompt_file or "arithmetic")
    assert all(str(part) == "arithmetic" or Path(part).is_file() for part in given)
