"""Where this project's trainer reaches into TRL's, and a check that TRL is still made that way.

Read and tested against TRL 1.14.2. These methods are TRL's own affair and may change with any
release; a renamed one would otherwise be a hook that is never called.
"""

import inspect

CHECKED_WITH = "1.14.2"
# Method: its parameters after `self`, and why it is overridden.
SEAMS: dict[str, tuple[tuple[str, ...], str]] = {
    "_generate": (("prompts",), "seconds of generation, each layer one matrix"),
    "_generate_single_turn": (
        ("prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"),
        "a prompt's cache shared by its group, fewer rows where memory ends",
    ),
    "_calculate_rewards": (
        ("inputs", "prompts", "completions", "completion_ids_list"),
        "what was sampled and earned",
    ),
    "_generate_and_score_completions": (("inputs",), "dead groups silenced, or replaced"),
    "_prepare_inputs": (("generation_batch",), "rows in the order of their prompts and lengths"),
    "compute_loss": (
        ("model", "inputs", "return_outputs", "num_items_in_batch"),
        "which rows have a gradient",
    ),
    "_get_per_token_logps_and_entropies": (
        ("model", "args", "batch_size", "compute_aux_loss", "kwargs"),
        "packed rows, the output layer in tiles",
    ),
    "training_step": (("model", "inputs", "num_items_in_batch"), "fewer rows, a finite loss"),
    "_save_checkpoint": (("model", "trial"), "whole or not at all"),
}


def moved_seams(trainer_class: type) -> list[str]:
    """Return the methods of TRL's trainer that are not as they were when this was written."""
    moved = []
    for name, (expected, _) in SEAMS.items():
        method = getattr(trainer_class, name, None)
        found = tuple(inspect.signature(method).parameters)[1:] if method else None
        if found != expected:
            moved.append(f"{name}({', '.join(found)})" if found is not None else f"no {name}")
    return moved


def check_seams(trainer_class: type) -> None:
    """Refuse a TRL that this trainer would silently not fit.

    Raises:
        RuntimeError: a method that is overridden is gone or has other parameters.
    """
    moved = moved_seams(trainer_class)
    if moved:
        import trl

        raise RuntimeError(
            f"trl {trl.__version__} has changed what this trainer builds on ({'; '.join(moved)}): "
            f"install trl=={CHECKED_WITH}, with which it was checked"
        )
