"""The files of recipes/: their settings resolve, and their first lines say what to type."""

from pathlib import Path

import pytest

from lora_grpo.config.presets import parse_train_config
from lora_grpo.config.train_config import TrainConfig

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_resolves_and_says_its_command_and_what_to_expect(recipe: Path) -> None:
    config, _ = parse_train_config(["--config", str(recipe)])
    assert isinstance(config, TrainConfig) and config.sft_steps
    header = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    assert any(f"train_lora.py --config recipes/{recipe.name}" in line for line in header)
    assert any("strict accuracy" in line or "Not yet run" in line for line in header)


def test_there_are_recipes_for_a_cpu_and_for_a_gpu() -> None:
    small = {recipe for recipe in RECIPES if recipe.stem.startswith("smollm2")}
    assert small and set(RECIPES) - small
