"""The card's metadata: the YAML that the Hub files a model by and its widgets read."""

from typing import TYPE_CHECKING, Any, Literal

from lora_grpo.results.records import Records, is_hub_id, short_name

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

Kind = Literal["adapter", "merged", "quantized"]
# To the Hub a "merge" is of several models: an adapter merged into its base is a fine-tune of it.
RELATIONS = {"adapter": "adapter", "merged": "finetune", "quantized": "quantized"}
METRICS = {
    "strict accuracy": "strict_accuracy",
    "lenient accuracy": "lenient_accuracy",
    "format": "format_rate",
}


def build_metadata(records: Records, kind: Kind, library_name: str, name: str) -> "ModelCardData":
    """Return the metadata of an adapter, or of a model made from it.

    Only an adapter has its evaluation in the model index: that of the others is not their own.
    """
    from huggingface_hub import ModelCardData

    base, results = records.base, list_results(records) if kind == "adapter" else []
    hub_id = base.hub_id if base else None
    return ModelCardData(
        base_model=hub_id,
        base_model_relation=RELATIONS[kind] if hub_id else None,
        datasets=records.hub_datasets or None,
        eval_results=results or None,
        language=records.languages or None,
        library_name=library_name,
        metrics=["accuracy"] if results else None,
        model_name=name if results else None,
        pipeline_tag="text-generation",
        tags=list_tags(records, kind),
        widget=build_widget(records, kind),
        **records.licence.metadata,
    )


def write_yaml(metadata: "ModelCardData") -> str:
    """Return the metadata as YAML that reads back as it is."""
    import yaml

    text = metadata.to_yaml()
    # PyYAML leaves Unicode's rarer line breaks bare and reads others; escaped they are safe.
    if yaml.safe_load(text) == metadata.to_dict():
        return text
    return yaml.dump(metadata.to_dict(), sort_keys=False).strip()


def list_tags(records: Records, kind: Kind) -> list[str]:
    lora = kind != "adapter" or records.adapter.get("peft_type") == "LORA"
    return [
        *(["grpo", "trl", "lora-grpo"] if records.trained else []),
        *(["lora"] if lora else []),
        *([kind] if kind != "adapter" else []),
    ]


def build_widget(records: Records, kind: Kind) -> list[dict[str, Any]] | None:
    """Return the first evaluated question as an example to try, with the adapter's own answer."""
    if not records.items:
        return None
    example: dict[str, Any] = {"messages": records.messages()}
    if kind == "adapter":
        example["output"] = {"text": records.items[0]["adapter"]["completion"]}
    return [example]


def list_results(records: Records) -> list["EvalResult"]:
    """Return the adapter's figures in per cent for the model index."""
    from huggingface_hub import EvalResult

    found = records.evaluation
    if not found:
        return []
    dataset, _, config = found["dataset"].partition(":")
    if not is_hub_id(found["dataset"]):
        dataset, config = short_name(found["dataset"]), ""
    results = []
    for label, key in METRICS.items():
        args: dict[str, Any] = {"num_items": found["num_items"], "decoding": "greedy"}
        if key == "strict_accuracy":
            low, high = (round(100 * bound, 2) for bound in found["adapter"]["ci95"])
            label += f", % (95 % Wilson interval {low} to {high})"
            args["ci95"] = [low, high]
        results.append(
            EvalResult(
                task_type="text-generation",
                task_name="Text Generation",
                dataset_type=dataset,
                dataset_name=short_name(found["dataset"]),
                dataset_config=config or None,
                dataset_split=found["split"],
                metric_type="accuracy",
                metric_name=label if "%" in label else f"{label}, %",
                metric_value=round(100 * found["adapter"][key], 2),
                metric_args=args,
            )
        )
    return results
