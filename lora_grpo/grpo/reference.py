"""The reference policy of the KL term where GRPO does not start from a fresh adapter."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftModel

REFERENCE = "ref"  # the name by which TRL 1.14.2 looks for it; without it the base is the reference


def keep_reference(model: "PeftModel") -> None:
    """Freeze a copy of the adapter as it is now beside it, as the reference that TRL computes
    `ref_logprobs` with; as TRL does for a model that comes with an adapter."""
    model.add_adapter(REFERENCE, model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            copy = model.get_parameter(name.replace(".default.", f".{REFERENCE}."))
            copy.data = parameter.data.clone()
            copy.requires_grad_(False)
