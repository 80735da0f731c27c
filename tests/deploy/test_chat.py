"""The chat says what the model that was evaluated says, as it says it, and nothing else ends it."""

import copy
import io
import json
import re
import signal
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from merge_models import LINEAR, save_adapter, write_train_config
from rich.console import Console

from lora_grpo.data.problems import Problem
from lora_grpo.data.prompt import PromptStyle, build_messages, perfect_completion, render
from lora_grpo.deploy import chat_model
from lora_grpo.deploy.chat import ChatConfig, chat, converse
from lora_grpo.deploy.chat_model import SIDES, ChatModel, Decoding, WordStreamer
from lora_grpo.deploy.chat_screen import paint, show, split_parts
from lora_grpo.deploy.source import find_source
from lora_grpo.policy.base import choose_placement, load_adapter, load_base
from lora_grpo.policy.generate import Completion, complete
from lora_grpo.tasks.task import NUMBER_TASK

SYSTEM = (
    "Respond in the following format:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>"
)
QUESTIONS = [
    "Leo sells 7 shells for 3 dollars each and 3 cakes for 6 dollars each. "
    "How many dollars does Leo get?",
    "There are 9 boxes with 9 books in each. How many books are there?",
]
LENGTH = 40


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """A random adapter of the embedded model, recorded as trained on 4-bit weights."""
    folder = save_adapter(
        tmp_path_factory.mktemp("adapters") / "run",
        tiny_model_folder,
        std=0.3,
        target_modules=LINEAR,
    )
    write_train_config(
        folder,
        tiny_model_folder,
        system_prompt=SYSTEM,
        example=None,
        load_in_4bit=True,
        bnb_4bit_use_double_quant=False,
        max_completion_length=LENGTH,
    )
    return folder


def reference(
    run_dir: Path, tiny_model_folder: Path, tokenizer, in_4bit: bool
) -> dict[str, list[Completion]]:
    """What evaluation's own path makes of the questions, base and adapter loaded apart."""
    prompts = [render(tokenizer, build_messages(q, PromptStyle(SYSTEM))) for q in QUESTIONS]
    found = {}
    for side in ("base", "adapter"):
        model = load_base(tiny_model_folder, choose_placement(), in_4bit, double_quant=False)
        if side == "adapter":
            model = load_adapter(model, run_dir)
        found[side] = complete(model, tokenizer, prompts, LENGTH, batch_size=1)
    return found


@pytest.mark.parametrize("load_in_4bit", [None, False])
def test_base_and_adapter_say_what_evaluation_scores(
    run_dir, tiny_model_folder, tokenizer, capsys, monkeypatch, load_in_4bit
) -> None:
    expected = reference(run_dir, tiny_model_folder, tokenizer, load_in_4bit is None)
    assert expected["base"] != expected["adapter"]
    questions = io.StringIO("\n".join([QUESTIONS[0], "", QUESTIONS[1], ""]))
    chat(ChatConfig(run_dir, json=True, compare=True, load_in_4bit=load_in_4bit), stdin=questions)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["question"] for row in rows] == QUESTIONS
    for index, row in enumerate(rows):
        for side in ("base", "adapter"):
            done = expected[side][index]
            assert row[side] == {
                "completion": done.text,
                "reasoning": NUMBER_TASK.parse_reasoning(done.text),
                "answer": NUMBER_TASK.parse(done.text),
                "truncated": done.truncated,
                "tokens": done.tokens,
            }


def test_a_merged_folder_is_asked_as_its_record_says(
    tiny_model_folder, tmp_path, tokenizer, capsys
) -> None:
    folder = tmp_path / "merged"
    folder.mkdir()
    for path in tiny_model_folder.iterdir():
        (folder / path.name).symlink_to(path)
    record = {"system_prompt": "Be brief.", "max_completion_length": 12, "load_in_4bit": True}
    (folder / "train_config.json").write_text(json.dumps(record))
    model = load_base(tiny_model_folder, choose_placement(), load_in_4bit=False)
    prompt = render(tokenizer, build_messages(QUESTIONS[0], PromptStyle("Be brief.")))
    (done,) = complete(model, tokenizer, [prompt], 12, batch_size=1)
    chat(ChatConfig(folder, json=True, ask=QUESTIONS[0]))
    found = json.loads(capsys.readouterr().out)
    assert (found["completion"], found["tokens"]) == (done.text, done.tokens)
    assert found["truncated"] is done.truncated


@pytest.fixture(scope="module")
def model(run_dir) -> ChatModel:
    return ChatModel(find_source(run_dir), Decoding(LENGTH))


def draw(model: ChatModel, *sides: str, **flags) -> dict[str, Completion]:
    """Ask a loaded model as one that was opened with these settings."""
    asked = copy.copy(model)
    asked.decoding, asked.sides = Decoding(LENGTH, **flags), sides
    return asked.answer(QUESTIONS[0])


@pytest.mark.parametrize("flags", [{}, {"temperature": 1.0, "seed": 3}])
def test_one_side_alone_says_what_it_says_beside_the_other(model, flags) -> None:
    both = draw(model, *SIDES, **flags)
    assert draw(model, "adapter", **flags)["adapter"] == both["adapter"]


def test_a_seed_decides_the_sampling_and_greedy_needs_none(model) -> None:
    drawn = [draw(model, "adapter", temperature=2.0, seed=seed) for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len({str(done) for done in drawn}) > 1
    greedy = draw(model, "adapter", seed=1)
    assert greedy == draw(model, "adapter", seed=2)
    assert greedy == draw(model, "adapter", temperature=2.0, top_p=1e-6)


def test_a_completion_streams_and_adds_up(model) -> None:
    chunks: list[str] = []
    done = model.answer(QUESTIONS[0], lambda side, text: chunks.append(text))["adapter"]
    assert "".join(chunks) == done.text
    assert len(list(filter(None, chunks))) > 5


def test_every_token_that_ends_a_turn_ends_the_answer(model, monkeypatch) -> None:
    whole = model.answer(QUESTIONS[0])["adapter"]
    tokenizer = model.source.tokenizer
    ids = tokenizer(whole.text, add_special_tokens=False)["input_ids"]
    config = model.model.generation_config
    monkeypatch.setattr(config, "eos_token_id", [tokenizer.eos_token_id, ids[4]])
    cut = model.answer(QUESTIONS[0])["adapter"]
    assert cut.tokens == ids.index(ids[4]) + 1 < whole.tokens
    assert not cut.truncated and whole.text.startswith(cut.text)


def typed(monkeypatch, *lines: str) -> None:
    """Let a person type these lines, then Ctrl-D; the line ^C stands for Ctrl-C."""
    left = iter(lines)

    def read(prompt: str) -> str:
        line = next(left, None)
        if line is None:
            raise EOFError
        if line == "^C":
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", read)


def test_ctrl_c_stops_the_answer_and_not_the_chat(model, monkeypatch, capsys) -> None:
    whole = model.answer(QUESTIONS[0])["adapter"]
    put, taken = WordStreamer.put, []

    def put_and_press(stream: WordStreamer, ids) -> None:
        put(stream, ids)
        taken.append(ids)
        if len(taken) == 5:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(WordStreamer, "put", put_and_press)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        typed(monkeypatch, QUESTIONS[0], "", QUESTIONS[0], "/quit", QUESTIONS[1])
        converse(model)
    finally:
        signal.signal(signal.SIGINT, handler)
    said = capsys.readouterr().out
    assert said.count("stopped") == 1 and said.count(f"{whole.tokens} tokens") == 1
    assert said.index("stopped") < said.index(f"{whole.tokens} tokens")
    assert len(taken) == 5 + 1 + whole.tokens  # each begins with the prompt; nothing after /quit


@pytest.mark.parametrize("end", ["/exit", "quit", "^C"])
def test_commands_are_not_put_to_the_model(end, monkeypatch, capsys) -> None:
    typed(monkeypatch, "/help", "/hlep", end, "What is 1 + 1?")
    converse(SimpleNamespace())  # which cannot be asked
    assert capsys.readouterr().out.count("/exit or /quit or Ctrl-D") == 2


def test_too_long_a_question_is_refused_and_the_next_is_answered(
    model, monkeypatch, capsys
) -> None:
    typed(monkeypatch, "so many words " * 400, QUESTIONS[0])
    converse(model)
    said = capsys.readouterr().out
    assert re.search(r"prompt of \d+ tokens, and with a completion of up to 40 the model", said)
    assert said.count(" tokens\n") + said.count("tokens,") >= 2


class Said:
    """Stands for a model that says given texts, so that what is drawn can be predicted."""

    task = NUMBER_TASK

    def __init__(self, **texts: str) -> None:
        self.texts, self.sides = texts, tuple(texts)

    def answer(self, question, say):
        for side, text in self.texts.items():
            for character in text:
                say(side, character)
        return {side: Completion(text, 9, False) for side, text in self.texts.items()}


def drawn(terminal: bool, **texts: str) -> str:
    file = io.StringIO()
    show(Console(file=file, force_terminal=terminal, width=80, highlight=False), Said(**texts), "?")
    return file.getvalue()


def test_reasoning_is_dim_and_the_answer_prominent() -> None:
    said = "<reasoning>\n[b]1+1[/b]\x1b[2J\n</reasoning>\n<answer>\n2\n</answer>"
    shown = drawn(True, adapter=said)
    assert re.search("\x1b\\[2m[^\x1b]*b", shown) and "\x1b[1;32m2\x1b[0m" in shown
    assert "\x1b[2J" not in shown
    plain = drawn(False, adapter=said)
    assert plain == "reasoning\n[b]1+1[/b]\u241b[2J\nanswer\n2\n9 tokens\n"
    assert drawn(False, adapter="hm <answ").startswith("hm <answ\n9 tokens, no answer")


def test_base_and_adapter_stand_side_by_side() -> None:
    shown = drawn(
        False, base="two, of course", adapter="<reasoning>a</reasoning><answer>2</answer>"
    )
    rows = [[cell.strip() for cell in re.split("[┃│]", line)[1:-1]] for line in shown.splitlines()]
    assert ["base", "adapter"] in rows
    assert ["two, of course", "reasoning"] in rows and ["", "2"] in rows
    assert shown.endswith("\n")


PIECES = st.sampled_from([*NUMBER_TASK.tags, "<", ">", "</", "<answer", " ", "\n", "7*3=21"])


@given(st.lists(st.one_of(PIECES, st.text()), max_size=12))
def test_what_was_shown_stays_and_nothing_of_the_text_is_lost(pieces: list[str]) -> None:
    completion = "".join(pieces)
    stages = [paint(completion[:end], finished=False).plain for end in range(len(completion) + 1)]
    for earlier, later in pairwise([*stages, paint(completion).plain]):
        assert later.startswith(earlier)
    # A mark between the parts, so that two of them do not join to a tag.
    completion = completion.replace("\0", "")
    shown = "\0".join(text for _, text in split_parts(completion))
    for tag in NUMBER_TASK.tags:
        completion, shown = completion.replace(tag, ""), shown.replace(tag, "")
    if not any(tag in completion + shown for tag in NUMBER_TASK.tags):
        assert "".join(shown.replace("\0", "").split()) == "".join(completion.split())


@given(st.integers(), st.text(alphabet="0123456789+*=\n ", min_size=1).filter(str.strip))
def test_what_was_asked_for_is_read_as_the_parser_reads_it(answer: int, reasoning: str) -> None:
    completion = perfect_completion(Problem(1, "?", str(answer), reasoning))
    assert split_parts(completion) == [
        ("reasoning", NUMBER_TASK.parse_reasoning(completion)),
        ("answer", NUMBER_TASK.parse(completion)),
    ]


def test_a_tag_counts_only_where_its_block_may_begin_or_end() -> None:
    text = "2 < 3, so\n\n  a <b> is </answer> no tag here, nor is <answe"
    assert split_parts(text) == [("text", text)]
    assert split_parts("<reasoning>\n1+1=2\n<answer>2</answer> so") == [
        ("reasoning", "1+1=2"),
        ("answer", "2"),
        ("text", "so"),
    ]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"folder": "nowhere"}, "nowhere does not exist"),
        ({"folder": "."}, "is not an adapter directory, it has no adapter_config.json"),
        ({"folder": "run/checkpoint-5"}, r"checkpoint .*chat.py \S*run$"),
        ({"folder": "whole", "compare": True}, "--compare needs an adapter directory"),
        ({"folder": "whole", "model": "tiny"}, "--model names the base of an adapter"),
        ({"folder": "empty"}, r"has no \*.safetensors"),
        ({"model": "run"}, "--model run is a folder without config.json"),
        ({"stdin": io.StringIO("")}, "no question came on standard input"),
        ({"stdin": io.StringIO("\n \n"), "json": True}, "no question came on standard input"),
        ({"ask": "so many words " * 400}, "the question comes to a prompt of"),
        (
            {"stdin": SimpleNamespace(isatty=lambda: True), "json": True},
            "--json needs --ask, or questions from a pipe",
        ),
    ],
)
def test_mistakes_are_refused_before_any_weights_load(
    run_dir, tiny_model_folder, tmp_path, monkeypatch, flags, said
) -> None:
    (tmp_path / "run").symlink_to(run_dir)
    (run_dir / "checkpoint-5").mkdir(exist_ok=True)
    (tmp_path / "whole").symlink_to(tiny_model_folder)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chat_model, "load_base", lambda *_: pytest.fail("weights were loaded"))
    flags = {"folder": "run", "stdin": io.StringIO("What is 1 + 1?"), **flags}
    stdin = flags.pop("stdin")
    folder = Path(flags.pop("folder"))
    with pytest.raises((OSError, ValueError), match=said):
        chat(ChatConfig(folder, **flags), stdin=stdin)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"ask": " "}, "--ask is blank"),
        ({"temperature": -1.0}, "--temperature must be 0 or more"),
        ({"temperature": float("nan")}, "--temperature must be 0 or more"),
        ({"top_p": 0.0, "temperature": 1.0}, "--top-p must be above 0"),
        ({"top_p": 0.9}, "changes nothing at temperature 0"),
        ({"max_completion_length": 0}, "--max-completion-length must be at least 1"),
    ],
)
def test_wrong_flags(flags, said) -> None:
    with pytest.raises(ValueError, match=said):
        ChatConfig(Path("run"), **flags)


def test_a_person_at_a_terminal_is_greeted_and_answered(run_dir, monkeypatch, capsys) -> None:
    typed(monkeypatch, QUESTIONS[0], "/exit")
    terminal = SimpleNamespace(isatty=lambda: True)
    chat(ChatConfig(run_dir, load_in_4bit=False, max_completion_length=8), stdin=terminal)
    said = capsys.readouterr().out
    assert "an adapter on" in said and "greedy, up to 8 tokens" in said
    assert "8 tokens, cut off there (--max-completion-length)" in said.splitlines()[-1]
