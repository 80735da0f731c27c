from copy import copy
from pathlib import Path

import pytest

from lora_grpo.data.problems import Problem
from lora_grpo.data.prompt import (
    PromptStyle,
    build_messages,
    count_tokens,
    find_turn_end,
    fit_style,
    keep_settings,
    perfect_completion,
    read_system_prompt,
    render,
)
from lora_grpo.tasks.task import NUMBER_TASK

EXAMPLE = Problem(4, "How many?", "72", "48/2=<<48/2=24>>24 clips\n48+24=<<48+24=72>>72")


def test_a_question_stands_alone_behind_the_system_prompt() -> None:
    assert build_messages("Why?") == [
        {"role": "system", "content": NUMBER_TASK.system_prompt},
        {"role": "user", "content": "Why?"},
    ]
    assert build_messages("Why?", PromptStyle("Be brief."))[0]["content"] == "Be brief."


def test_the_perfect_completion_leaves_gsm8k_s_calculations_out() -> None:
    assert perfect_completion(EXAMPLE) == (
        "<reasoning>\n48/2=24 clips\n48+24=72\n</reasoning>\n<answer>\n72\n</answer>"
    )
    assert NUMBER_TASK.has_format(perfect_completion(Problem(1, "q", "5")))


def test_one_shot_shows_a_question_answered_as_asked(tokenizer) -> None:
    messages = build_messages("Why?", PromptStyle("Be brief.", EXAMPLE))
    assert messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": perfect_completion(EXAMPLE)},
        {"role": "user", "content": "Why?"},
    ]
    text = render(tokenizer, messages)
    assert text.endswith(
        "user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )  # for the model to continue


def test_tokens_are_counted_as_the_template_counts_them(tokenizer) -> None:
    conversations = [build_messages(question) for question in ("Why?", "How many pens? " * 20)]
    expected = [
        len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        for messages in conversations
    ]
    texts = (render(tokenizer, messages) for messages in conversations)
    assert count_tokens(tokenizer, texts) == expected
    assert count_tokens(tokenizer, []) == []


def test_a_system_prompt_of_one_s_own(tmp_path: Path) -> None:
    assert read_system_prompt(None) == NUMBER_TASK.system_prompt
    path = tmp_path / "prompt.txt"
    path.write_text("\n  Answer in <answer> tags: \u00e9\n", encoding="utf-8-sig")
    assert read_system_prompt(path) == "Answer in <answer> tags: \u00e9"


def test_a_system_prompt_file_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    with pytest.raises(FileNotFoundError, match=f"--system-prompt-file {path} does not exist"):
        read_system_prompt(path)
    with pytest.raises(FileNotFoundError, match=f"--system-prompt-file {tmp_path} does not exist"):
        read_system_prompt(tmp_path)
    path.write_text(" \n\t")
    with pytest.raises(ValueError, match=f"--system-prompt-file {path} is blank"):
        read_system_prompt(path)
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=f"--system-prompt-file {path} is not UTF-8 text"):
        read_system_prompt(path)


THINKING = (
    "{%- for m in messages %}{{ m.content }}{%- endfor %}"
    "{%- if enable_thinking is defined and enable_thinking is false %}<no thoughts>{%- endif %}"
)


def test_a_saved_template_asks_as_training_did(tokenizer) -> None:
    """Qwen3's would have the model think, wherever nobody says otherwise."""
    trained = copy(tokenizer)
    trained.chat_template = THINKING
    saved = copy(tokenizer)
    saved.chat_template = keep_settings(THINKING)
    messages = build_messages("How many?")
    plain = {"add_generation_prompt": True, "tokenize": False}
    assert saved.apply_chat_template(messages, **plain) == render(trained, messages)
    assert trained.apply_chat_template(messages, **plain) != render(trained, messages)
    thinking = saved.apply_chat_template(messages, enable_thinking=True, **plain)
    assert thinking == trained.apply_chat_template(messages, enable_thinking=True, **plain)
    assert keep_settings(tokenizer.chat_template) == tokenizer.chat_template


TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
LOOP = "{% for m in messages %}" + TURN + "{% endfor %}"
REFUSING = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + LOOP
)
DROPPING = LOOP.replace("in messages %}", "in messages if m.role != 'system' %}")


def opening(text: str) -> str:
    answer = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n" + text + "' }}{% endif %}"
    return LOOP + answer


@pytest.mark.parametrize("template", [REFUSING, DROPPING])
def test_without_a_system_turn_its_text_opens_the_first_user_turn(tokenizer, template) -> None:
    other = copy(tokenizer)
    other.chat_template = template
    style = fit_style(other, PromptStyle("Be brief.", EXAMPLE))
    roles = [message["role"] for message in build_messages("Why?", style)]
    assert roles == ["user", "assistant", "user"]
    text = render(other, build_messages("Why?", style))
    assert text.startswith("<|im_start|>user\nBe brief.\n\nHow many?<|im_end|>")
    assert text.count("Be brief.") == 1
    assert fit_style(tokenizer, PromptStyle("Be brief.")) == PromptStyle("Be brief.")


@pytest.mark.parametrize(
    ("template", "prefill"),
    [
        (opening(""), ""),
        (opening("<think>\n"), "<think>\n"),
        (opening("<reasoning>\n"), "<reasoning>\n"),
        (opening("<think>\n\n</think>\n\n"), ""),  # Qwen3 with enable_thinking=False
        (opening("<think>\n\n</think>\n\n<reasoning>"), "<reasoning>"),
        (  # earlier turns keep an empty block
            opening("<think>\n").replace(
                "m.role + '\n'",
                "m.role + '\n' + ('<think>\n\n</think>\n\n' if m.role == 'assistant' else '')",
            ),
            "<think>\n",
        ),
        (  # a special token is no part of a decoded completion
            "{% for m in messages %}{{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|><think>{% endif %}",
            "<think>",
        ),
        # Mistral's, whose assistant turn has no header
        ("{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}", ""),
    ],
)
def test_what_the_template_writes_of_the_answer_is_known(tokenizer, template, prefill) -> None:
    other = copy(tokenizer)
    other.chat_template = template
    assert fit_style(other).prefill == prefill


def test_the_token_that_ends_a_turn_is_read_from_the_template(tokenizer) -> None:
    other = copy(tokenizer)
    assert find_turn_end(other) == other.convert_tokens_to_ids("<|im_end|>")
    other.chat_template = LOOP.replace("<|im_end|>", "<|endoftext|>")
    assert find_turn_end(other) == other.convert_tokens_to_ids("<|endoftext|>")
    other.chat_template = LOOP.replace("<|im_end|>", "")
    assert find_turn_end(other) is None


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.content }", "line 1"),
        ("{{ raise_exception('never') }}", "never"),
        ("Hello", "leaves the question out"),
    ],
)
def test_a_template_that_cannot_be_rendered_is_refused(tokenizer, template, reason) -> None:
    other = copy(tokenizer)
    other.chat_template = template
    with pytest.raises(ValueError, match=f"chat template of .*{reason}"):
        fit_style(other)
