import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from go_templates import interpret, run_go

from lora_grpo.data.problems import Problem
from lora_grpo.data.prompt import PromptStyle
from lora_grpo.export.ollama import (
    build_modelfile,
    parse_modelfile,
    prove_modelfile,
    values_of,
    write_command,
)
from lora_grpo.export.ollama_template import (
    adds_bos,
    conversations,
    expected_prompt,
    find_chat_format,
)

REAL = Path.home() / ".cache" / "real-models"
STYLE = PromptStyle(example=Problem(1, 'Is "3" > {{2}}?\nSay é.', "3", '3 is "3"\n\\so'))
TURN = "'<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n'"
GO_ON = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
QWEN25 = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}"
    "{% endif %}{% for m in messages %}{{ " + TURN + " }}{% endfor %}" + GO_ON
)
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<|im_start|>assistant\\n<think>\\n"
    "\\n</think>\\n\\n' + m.content.lstrip('\\n') + '<|im_end|>\\n' }}{% else %}{{ " + TURN + " }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set c = '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' "
    "+ m.content | trim + '<|eot_id|>' %}{% if loop.first %}{% set c = bos_token + c %}{% endif %}"
    "{{ c }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
LLAMA31 = LLAMA3.replace(
    "m.content | trim", "('Cutting Knowledge Date: May\\n\\n' if m.role == 'system' else '') + "
    "m.content | trim"
).replace(
    "{% for m", "{% if messages[0].role != 'system' %}{% set messages = [{'role': 'system', "
    "'content': ''}] + messages %}{% endif %}{% for m", 1
)  # fmt: skip
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}{{ " + TURN + " }}{% endfor %}" + GO_ON
)
TEMPLATES = {"qwen2.5": QWEN25, "qwen3": QWEN3, "llama3": LLAMA3, "llama3.1": LLAMA31}
TEMPLATES["no system"] = NO_SYSTEM
BOS_COUNTS = {"llama3": 2, "llama3.1": 2}


@pytest.fixture
def merged(tmp_path: Path, tiny_model_folder: Path) -> Path:
    """The embedded model's folder without its weights, to be changed."""
    folder = tmp_path / "merged"
    shutil.copytree(tiny_model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def use_template(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def use_bos(folder: Path, added: bool) -> None:
    """Give the tokenizer a BOS, and have it put it first or not."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    backend = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    names = {"bos_token": "<bos>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    if added:
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", made.bos_token_id)]
        )
    made.chat_template = template
    made.save_pretrained(folder)


def prove(folder: Path, text: str, style: PromptStyle = STYLE) -> dict[str, bool]:
    return {check.name: check.passed for check in prove_modelfile(text, folder, style)}


def all_pass(folder: Path, style: PromptStyle = STYLE) -> str:
    text = build_modelfile(folder, "x.gguf", style, 64)
    failed = [check for check in prove_modelfile(text, folder, style) if not check.passed]
    assert not failed
    return text


def load(folder: Path):
    from lora_grpo.policy.base import load_tokenizer

    return load_tokenizer(folder)


@pytest.mark.parametrize("style", [PromptStyle(), STYLE])
def test_the_embedded_model_s_modelfile_is_proven(merged: Path, style: PromptStyle) -> None:
    text = all_pass(merged, style)
    commands = parse_modelfile(text)
    assert commands[0] == ("FROM", "./x.gguf")
    assert values_of(commands, "SYSTEM") == [style.system_prompt]
    assert values_of(commands, "PARAMETER stop") == ["<|im_end|>"]
    assert values_of(commands, "PARAMETER num_predict") == ["64"]
    assert values_of(commands, "PARAMETER num_ctx") == ["1024"]
    asked = values_of(commands, "MESSAGE user")
    assert asked == ([style.example.question] if style.example else [])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("added", [True, False])
def test_the_template_of_every_family_is_proven(merged: Path, name: str, added: bool) -> None:
    use_template(merged, TEMPLATES[name])
    if name in BOS_COUNTS:
        use_bos(merged, added)
        assert adds_bos(load(merged)) == added
    style = replace(STYLE, system_role=name != "no system")
    # Ollama writes the BOS of a conversation where the tokenizer does, and would double it.
    assert all_pass(merged, style).count("<bos>") == max(BOS_COUNTS.get(name, 0) - 2 * added, 0)


def render_cases(folder: Path) -> tuple[list[tuple[str, dict]], list[str]]:
    """Return each family's Go template with the values of each conversation, and the tokenizer's
    own text for it."""
    cases, expected = [], []
    for template in TEMPLATES.values():
        use_template(folder, template)
        if "bos_token" in template:
            use_bos(folder, False)
        tokenizer = load(folder)
        found = find_chat_format(tokenizer)
        for talk in conversations(found.family.trims):
            system = [message["content"] for message in talk if message["role"] == "system"]
            named = [{"Role": m["role"], "Content": m["content"]} for m in talk]
            cases.append((found.go_template(), {"System": "".join(system), "Messages": named}))
            expected.append(expected_prompt(tokenizer, talk, found.system_role))
    assert len(cases) > 30 * len(TEMPLATES)
    return cases, expected


def test_the_go_templates_write_what_the_tokenizer_writes(merged: Path) -> None:
    cases, expected = render_cases(merged)
    assert [interpret(template, values) for template, values in cases] == expected


def test_go_itself_writes_what_the_tokenizer_writes(merged: Path) -> None:
    cases, expected = render_cases(merged)
    assert run_go(merged.parent, cases) == expected


@pytest.mark.parametrize("name", ["qwen2.5-tokenizer", "smollm2-135m-instruct"])
def test_published_templates(merged: Path, name: str) -> None:
    if not (REAL / name / "complete.json").is_file():
        pytest.skip(f"{REAL / name} has not been built")
    for path in (REAL / name).glob("*token*"):
        shutil.copyfile(path, merged / path.name)
    (merged / "chat_template.jinja").unlink()
    if (REAL / name / "chat_template.jinja").is_file():
        shutil.copyfile(REAL / name / "chat_template.jinja", merged / "chat_template.jinja")
    ends = load(merged).convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    (merged / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    stops = values_of(parse_modelfile(all_pass(merged)), "PARAMETER stop")
    assert stops == ["<|im_end|>", "<|endoftext|>"]


def test_a_trimming_template_gets_trimmed_prompts(merged: Path) -> None:
    use_template(merged, LLAMA3.replace("bos_token + ", ""))
    text = all_pass(merged, PromptStyle(" Be brief.\n"))
    assert values_of(parse_modelfile(text), "SYSTEM") == ["Be brief."]
    assert "trims white space" in text


@pytest.mark.parametrize(
    ("damage", "caught"),
    [
        (("stop <|im_end|>", "stop <|endoftext|>"), "stops"),
        (("PARAMETER stop <|im_end|>\n", ""), "stops"),
        (("<|im_end|>\n{{ end }}{{ if eq", "<|endoftext|>\n{{ end }}{{ if eq"), "template"),
        (("<|im_end|>\n{{ end }}{{ if eq", "<|im_end|>{{ end }}{{ if eq"), "template"),
        (("<|im_start|>assistant\n{{ if", "<|im_start|>assistant\n\n{{ if"), "template"),
        (("{{ else if eq", "{{- else if eq"), "template"),
        (("following format", "following form"), "trained_prompt"),
        (("MESSAGE user", "MESSAGE assistant"), "trained_prompt"),
        (("FROM ./x.gguf\n", ""), "modelfile"),
        (("TEMPLATE ", "TEMPLATES "), "modelfile"),
        (("SYSTEM ", 'SYSTEM """'), "trained_prompt"),
    ],
)
def test_damage_is_caught_by_name(merged: Path, damage: tuple[str, str], caught: str) -> None:
    text = build_modelfile(merged, "x.gguf", STYLE, 64)
    assert text.count(damage[0]) == 1
    assert prove(merged, text.replace(*damage))[caught] is False


def test_a_wrong_end_in_the_folder_is_caught(merged: Path) -> None:
    text = build_modelfile(merged, "x.gguf", STYLE, 64)
    (merged / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    assert prove(merged, text)["stops"] is False


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ '[INST]' + m.content }}{% endfor %}", "writes a question as"),
        (NO_SYSTEM.replace("{% endfor %}", "{{ loop.length }}{% endfor %}"), "ChatML: "),
        ("{{ strftime_now('%d') }}" + QWEN25, "date"),
        ("{{ '{' + '{ x }' + '}' }}" + QWEN25, "braces"),
    ],
)
def test_a_template_of_no_family_is_refused(merged: Path, template: str, reason: str) -> None:
    use_template(merged, template)
    with pytest.raises(ValueError, match=rf"ChatML, Llama 3; .*{reason}.*use --format gguf"):
        build_modelfile(merged, "x.gguf", STYLE, 64)


def test_a_bos_that_training_did_not_have_is_refused(merged: Path) -> None:
    use_bos(merged, True)
    with pytest.raises(ValueError, match="puts <bos> first and the template does not"):
        build_modelfile(merged, "x.gguf", STYLE, 64)


@pytest.mark.parametrize(
    "value", ["", " x ", "x", '"', '"x"', '"""', 'a"""b', "a\n\n", '\n"x"\n\t', "#x"]
)
def test_values_survive_quoting(value: str) -> None:
    text = "# note\n" + write_command(("SYSTEM", value)) + "FROM ./x.gguf\n"
    assert parse_modelfile(text) == [("SYSTEM", value), ("FROM", "./x.gguf")]


@pytest.mark.parametrize("value", ['a"""\nb', 'a""" \n', "a\u00a0b", "a\u200db", "a\x00b"])
def test_what_ollama_would_not_read_back_is_refused(merged: Path, value: str) -> None:
    with pytest.raises(ValueError, match="SYSTEM cannot be written to an Ollama Modelfile"):
        build_modelfile(merged, "x.gguf", PromptStyle(value), 64)


def test_limits_follow_the_training(merged: Path) -> None:
    config = json.loads((merged / "config.json").read_text())
    config["max_position_embeddings"] = 32768
    (merged / "config.json").write_text(json.dumps(config))
    for prompt, completion, room in ((160, 64, 4096), (4000, 2000, 6000), (160, None, 4096)):
        (merged / "train_config.json").write_text(json.dumps({"max_prompt_length": prompt}))
        commands = parse_modelfile(build_modelfile(merged, "x.gguf", STYLE, completion))
        assert values_of(commands, "PARAMETER num_ctx") == [str(room)]
        predict = values_of(commands, "PARAMETER num_predict")
        assert predict == ([str(completion)] if completion else [])


def test_the_licence_goes_along(merged: Path) -> None:
    (merged / "LICENSE").write_text('MIT\n\n\f"as is"\n', encoding="utf-8")
    commands = parse_modelfile(build_modelfile(merged, "x.gguf", STYLE, 64))
    assert values_of(commands, "LICENSE") == ['MIT\n\n"as is"\n']
