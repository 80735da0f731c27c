"""The card's metadata: the YAML that the Hub files a model by and its widgets read."""

from typing import TYPE_CHECKING, Any, Literal

from lora_grpo.results.records import Records, is_hub_id, short_name

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

Kind = Literal["adapter", "merged", "quantized"]
# To the Hub a "merge" is of several models: an adapter merged into its base is a fine-tune of it.
RELATIONS = {"adapter": "adapter", "merged": "finetune", "quantized": "quantized"}
METRICS = {
    "strict_accuracy": "strict accuracy",
    "lenient_accuracy": "lenient accuracy",
    "format_rate": "format",
}


def build_metadata(records: Records, kind: Kind, library_name: str, name: str) -> "ModelCardData":
    """Return the metadata of an adapter, or of a model made from it.

    Only an adapter has its evaluation in the model index: that of the others is not their own.
    """
    from huggingface_hub import ModelCardData

    found, data = records.evaluation, records.trained.get("dataset", "")
    own = [build_result(found, key) for key in METRICS] if found and kind == "adapter" else []
    hub_id = records.base.hub_id if records.base else None
    is_lora = kind != "adapter" or records.adapter.get("peft_type") == "LORA"
    tags = [
        *(["grpo", "trl", "lora-grpo"] if records.trained else []),
        *(["lora"] if is_lora else []),
        *([kind] if kind != "adapter" else []),
    ]
    return ModelCardData(
        base_model=hub_id,
        base_model_relation=RELATIONS[kind] if hub_id else None,
        datasets=[data.partition(":")[0]] if is_hub_id(data) else None,
        eval_results=own or None,
        language=records.languages or None,
        library_name=library_name,
        metrics=["accuracy"] if own else None,
        model_name=name if own else None,
        pipeline_tag="text-generation",
        tags=tags,
        widget=build_widget(records, kind) if records.items else None,
        **records.licence.metadata,
    )


def write_yaml(metadata: "ModelCardData") -> str:
    """Return the metadata as YAML that reads back as it is: what is not ASCII escaped, because
    PyYAML leaves Unicode's rarer line breaks bare and reads others."""
    import yaml

    return yaml.dump(metadata.to_dict(), sort_keys=False).strip()


def build_widget(records: Records, kind: Kind) -> list[dict[str, Any]]:
    """Return the first evaluated question as an example to try, with the adapter's own answer."""
    example: dict[str, Any] = {"messages": records.messages()}
    if kind == "adapter":
        example["output"] = {"text": records.items[0]["adapter"]["completion"]}
    return [example]


def build_result(found: dict[str, Any], key: str) -> "EvalResult":
    """Return one of the adapter's figures in per cent for the model index."""
    from huggingface_hub import EvalResult

    name, (dataset, _, config) = found["dataset"], found["dataset"].partition(":")
    if not is_hub_id(name):
        dataset, config = short_name(name), ""
    label = f"{METRICS[key]}, %"
    settings: dict[str, Any] = {"num_items": found["num_items"], "decoding": "greedy"}
    if key == "strict_accuracy":
        low, high = settings["ci95"] = [round(100 * end, 2) for end in found["adapter"]["ci95"]]
        label += f" (95 % Wilson interval {low} to {high})"
    return EvalResult(
        task_type="text-generation",
        task_name="Text Generation",
        dataset_type=dataset,
        dataset_name=short_name(name),
        dataset_config=config or None,
        dataset_split=found["split"],
        metric_type="accuracy",
        metric_name=label,
        metric_value=round(100 * found["adapter"][key], 2),
        metric_args=settings,
    )
