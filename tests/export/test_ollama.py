import json
import shutil
from pathlib import Path

import pytest
from go_templates import run_go

from lora_grpo.data.problems import Problem
from lora_grpo.data.prompt import PromptStyle
from lora_grpo.export.ollama import (
    build_modelfile,
    collate,
    conversations,
    parse_modelfile,
    prove_modelfile,
    values_of,
    write_command,
)
from lora_grpo.export.ollama_template import adds_bos, build_template, expected_prompt, probe

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
    "{% for m in messages %}{% set c = '<|start|>' + m.role + '<|end|>\\n\\n' + m.content | trim + "
    "'<|im_end|>' %}{% if loop.first %}{% set c = bos_token + c %}{% endif %}{{ c }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + "
    "'\\n\\n' %}{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages "
    "%}{% endif %}{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ '<start_of_turn>' + ('model' if "
    "m.role == 'assistant' else m.role) + '\\n' + (first if loop.first else '') + m.content | trim "
    "+ '<im_end>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
TEMPLATES = {"qwen2.5": QWEN25, "qwen3": QWEN3, "llama3": LLAMA3, "gemma": GEMMA}
TEMPLATES["llama2"] = (
    "{% if messages[0].role == 'system' %}{% set s = '<<SYS>>\\n' + messages[0].content + "
    "'\\n<</SYS>>\\n\\n' %}{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% set rest = "
    "messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + "
    "(s if loop.first else '') + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + ' ' + "
    "eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES["braces"] = (
    "{% for m in messages %}{{ '{' + '{' + m.role + '}' + '}\\u00a0' + m.content + '\"\"\"\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '{' + '{go}' + '}' }}{% endif %}"
)

BOS_COUNTS = {"llama3": 2, "gemma": 2, "llama2": 3}


@pytest.fixture
def merged(tmp_path: Path, tiny_model_folder: Path) -> Path:
    """The embedded model's folder, less its weights, to be changed."""
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
def test_every_family_s_template_is_said_in_go(merged: Path, name: str, added: bool) -> None:
    use_template(merged, TEMPLATES[name])
    if name in BOS_COUNTS:
        use_bos(merged, added)
        assert adds_bos(load(merged)) == added
    # Ollama writes the BOS of a conversation where the tokenizer does, and would double it.
    assert all_pass(merged).count("<bos>") == max(BOS_COUNTS.get(name, 0) - 2 * added, 0)


def test_go_renders_every_template_as_the_tokenizer_does(merged: Path) -> None:
    cases, expected = [], []
    for name, template in TEMPLATES.items():
        use_template(merged, template)
        if "bos_token" in template:
            use_bos(merged, False)
        tokenizer = load(merged)
        turns = probe(tokenizer)
        for talk in conversations(turns.trimmed):
            cases.append((build_template(turns), collate(talk)))
            expected.append(expected_prompt(tokenizer, talk))
        assert len(cases) > 30, name
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
        (("temperature 0", "temperature 0.8"), "greedy_parameters"),
        (("PARAMETER repeat_penalty 1\n", ""), "greedy_parameters"),
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
        ("{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
         "{% endif %}{{ m.content }}{% endfor %}", "no system role"),
        ("{% for m in messages %}{{ m.content + m.content }}{% endfor %}", "once and in order"),
        ("{% for m in messages %}{{ loop.index ~ m.content }}{% endfor %}", "messages beside it"),
        ("{{ strftime_now('%d') }}{% for m in messages %}{{ m.content }}{% endfor %}", "date"),
    ],
)  # fmt: skip
def test_what_go_cannot_say_is_refused(merged: Path, template: str, reason: str) -> None:
    use_template(merged, template)
    with pytest.raises(ValueError, match=f"Ollama's Go templates .*{reason}.*export gguf instead"):
        build_modelfile(merged, "x.gguf", STYLE, 64)


def test_a_bos_that_training_did_not_have_is_refused(merged: Path) -> None:
    use_bos(merged, True)
    with pytest.raises(ValueError, match="puts <bos> first and the template does not"):
        build_modelfile(merged, "x.gguf", STYLE, 64)


@pytest.mark.parametrize(
    "value", ["", " x ", "x", '"', '"x"', '"""', 'a"""b', "a\n\n", '\n"x"\n\t', "#x"]
)
def test_values_survive_quoting(value: str) -> None:
    text = "# note\n" + write_command("SYSTEM", value) + "FROM ./x.gguf\n"
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
