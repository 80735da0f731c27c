"""How to run what a card describes, as commands and code that work as they stand.

A folder's records go in; Markdown comes out. The prompt is always the one trained with.
"""

import json
import shlex
from pathlib import Path

from lora_grpo.config.knobs import TrainConfig
from lora_grpo.data.prompt import TEMPLATE_SETTINGS, Message
from lora_grpo.policy.base import EMBEDDED
from lora_grpo.policy.vllm import RANKS, allowed_rank
from lora_grpo.results.markdown import code, fence
from lora_grpo.results.records import Base, Records

EMBEDDED_IN_SHELL = (
    "\"$(python -c 'from lora_grpo import EMBEDDED_FOLDER; print(EMBEDDED_FOLDER)')\""
)
# Its owner is filled in by a push.
HUB_OWNER = "OWNER"
LOAD_ADAPTER = """\
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
{imports}
places = {places}  # this folder's path, or its id on the Hub
adapter = next((p for p in places if Path(p, "adapter_config.json").is_file()), places[-1])
base = {base}
tokenizer = AutoTokenizer.from_pretrained({tokenizer})
model = AutoModelForCausalLM.from_pretrained(base, {revision}dtype="auto", device_map="auto")
model = PeftModel.from_pretrained(model, adapter)
"""
LOAD_MODEL = """\
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

places = {places}  # this folder's path, or its id on the Hub
folder = next((p for p in places if Path(p, "config.json").is_file()), places[-1])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="auto")
"""
IN_4BIT = (
    "This holds the base in its own type; in training it was held in 4-bit NF4, so that single "
    "answers may differ from the run's."
)
ASK = """\
messages = [
{messages}
]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"{settings}
).to(model.device)
output = model.generate(**inputs, max_new_tokens={length}, do_sample=False)
new_tokens = output[0, inputs["input_ids"].shape[1] :]
print({begun}tokenizer.decode(new_tokens, skip_special_tokens=True))"""


def literal(text: str, indent: str) -> str:
    """Return a Python expression of the text, a line of code for each of its lines."""
    lines = [json.dumps(line, ensure_ascii=False) for line in text.splitlines(keepends=True)]
    if len(lines) < 2:
        return lines[0] if lines else '""'
    return "(\n" + "".join(f"{indent}    {line}\n" for line in lines) + f"{indent})"


def write_message(message: Message) -> str:
    content = literal(message["content"], "        ")
    return (
        f'    {{\n        "role": "{message["role"]}",\n        "content": {content},\n    }},'
        if "\n" in content
        else f'    {{"role": "{message["role"]}", "content": {content}}},'
    )


def completion_length(records: Records) -> int:
    return records.trained.get("max_completion_length", TrainConfig.max_completion_length)


def needs_settings(folder: Path) -> bool:
    """Tell whether a folder's chat template knows the settings that training gave it."""
    path = folder / "chat_template.jinja"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return any(name in text for name in TEMPLATE_SETTINGS)


def ask_in_python(records: Records, folder: Path) -> str:
    """Return code that puts the first evaluated question to a loaded `model`."""
    settings = "".join(f", {name}={value}" for name, value in TEMPLATE_SETTINGS.items())
    return ASK.format(
        messages="\n".join(map(write_message, records.messages())),
        settings=settings if needs_settings(folder) else "",
        length=completion_length(records),
        begun=f"{json.dumps(prefill)} + " if (prefill := records.style.prefill) else "",
    )


def ask_by_curl(records: Records, folder: Path, model: str) -> str:
    """Return a command that asks the same of an OpenAI-compatible server."""
    body = {
        "model": model,
        "messages": records.messages(),
        "temperature": 0,
        "max_tokens": completion_length(records),
        **({"chat_template_kwargs": TEMPLATE_SETTINGS} if needs_settings(folder) else {}),
    }
    sent = shlex.quote(json.dumps(body, ensure_ascii=False))
    return (
        "curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f"  -d {sent}"
    )


def serve_and_ask(served: str, asked: str) -> list[str]:
    where = "With vLLM, in the folder that this one lies in:"
    return [where, fence(served, "bash"), "and from another shell:", fence(asked, "bash")]


def use_adapter(records: Records, name: str) -> str:
    """Return how to use an adapter directory: PEFT, vLLM, and what else it can be turned into."""
    parts = [peft_code(records, name)] if records.base else []
    command = vllm_command(records, name)
    if command:
        parts += serve_and_ask(command, ask_by_curl(records, records.folder, name))
    if records.adapter.get("peft_type") != "LORA":
        return "\n\n".join(parts)
    parts.append(
        "For transformers alone, llama.cpp or Ollama the adapter is first merged into its base, "
        "with lora-grpo's scripts:\n\n"
        + fence(
            f"python scripts/merge_adapter.py {shlex.quote(name)}\n"
            f"python scripts/export_model.py {shlex.quote(name)} --format gguf --quant q8_0",
            "bash",
        )
    )
    return "\n\n".join(parts)


def peft_code(records: Records, name: str) -> str:
    base, folder = records.base, records.folder
    embedded = base.name == EMBEDDED
    load = LOAD_ADAPTER.format(
        imports="\nfrom lora_grpo import EMBEDDED_FOLDER\n" if embedded else "",
        places=list_places(name, "adapters"),
        base="EMBEDDED_FOLDER  # comes with lora-grpo" if embedded else name_in_python(base),
        tokenizer="adapter" if (folder / "tokenizer_config.json").is_file() else "base",
        revision=f"revision={json.dumps(base.revision)}, " if base.revision else "",
    )
    parts = ["With PEFT:", fence(f"{load}\n{ask_in_python(records, folder)}", "python")]
    return "\n\n".join([*parts, IN_4BIT] if records.trained.get("load_in_4bit") else parts)


def list_places(name: str, home: str) -> str:
    """Return, in Python, where a folder is looked for: where its user may stand, then the Hub."""
    places = (".", name, f"{home}/{name}", hub_place(name))
    return f"({', '.join(json.dumps(place, ensure_ascii=False) for place in places)})"


def hub_place(name: str) -> str:
    """Return the id on the Hub that a card names until it is pushed."""
    return f"{HUB_OWNER}/{name}"


def name_in_python(base: Base) -> str:
    name = json.dumps(base.name, ensure_ascii=False)
    return name if base.hub_id else f"{name}  # the folder of the base model"


def vllm_command(records: Records, name: str) -> str | None:
    """Return the command that serves base and adapter, None where vLLM would refuse the adapter."""
    base, adapter = records.base, records.adapter
    ranks = [adapter.get("r", 0), *adapter.get("rank_pattern", {}).values()]
    plain = adapter.get("peft_type") == "LORA" and not adapter.get("use_dora")
    if base is None or not plain or max(ranks) > RANKS[-1]:
        return None
    model = EMBEDDED_IN_SHELL if base.name == EMBEDDED else shlex.quote(base.name)
    revision = f" --revision {shlex.quote(base.revision)}" if base.revision else ""
    return (
        f"vllm serve {model}{revision} \\\n  --enable-lora "
        f"--max-lora-rank {allowed_rank(max(ranks))} --lora-modules {shlex.quote(f'{name}={name}')}"
    )


def use_model(records: Records, folder: Path, name: str) -> str:
    """Return how to use a merged folder, which any loader reads: transformers and vLLM.

    `folder` is where the model lies now, `name` the name of the folder that it is bound for.
    """
    load = LOAD_MODEL.format(places=list_places(name, "merged"))
    served = f"vllm serve {shlex.quote(name)} --served-model-name {shlex.quote(name)}"
    return "\n\n".join(
        (
            "With transformers:",
            fence(f"{load}\n{ask_in_python(records, folder)}", "python"),
            *serve_and_ask(served, ask_by_curl(records, folder, name)),
            f"For llama.cpp and Ollama, lora-grpo makes GGUF files of it: {export_hint(name)}.",
        )
    )


def export_hint(name: str) -> str:
    return code(f"python scripts/export_model.py {shlex.quote(name)} --format gguf --quant q8_0")
