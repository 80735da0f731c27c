import dataclasses
import json
import re
from pathlib import Path

import pytest

from lora_grpo.config.presets import parse_train_config
from lora_grpo.config.train_config import TrainConfig
from lora_grpo.data.problems import Problem, load_problems, normalise
from lora_grpo.data.prompt import build_messages, count_tokens, render
from lora_grpo.policy.adapter import read_record
from lora_grpo.results.evaluate import EvaluateConfig, held_out_problems
from lora_grpo.rewards.builtin import build_rewards
from lora_grpo.tasks.task import NUMBER_TASK
from lora_grpo.train.prepare import Data, count_validation_items, hold_out, prepare_data

REWARDS = build_rewards()
SMALL = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_generations": 2,
    "num_validation_items": 4,
}


def make_rows(count: int, start: int = 0) -> list[dict[str, str]]:
    return [
        {"question": f"What is {number} and 1?", "answer": f"{number}+1\n#### {number + 1}"}
        for number in range(start, start + count)
    ]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_folder(folder: Path, train: list[dict], test: list[dict]) -> str:
    write(folder / "train.jsonl", train)
    write(folder / "test.jsonl", test)
    return str(folder)


def configure(dataset: str, **settings) -> TrainConfig:
    return TrainConfig(dataset=dataset, **{**SMALL, **settings})


def rows_of(problems: list[Problem]) -> list[int]:
    return [problem.row for problem in problems]


def questions_of(problems: list[Problem]) -> set[str]:
    return {normalise(problem.question) for problem in problems}


def assert_disjoint(data: Data) -> None:
    parts = [questions_of(part) for part in (data.train, data.validation, data.test)]
    assert sum(map(len, parts)) == len(set().union(*parts))


# A good dataset


def test_a_folder_s_test_split_is_the_test_and_validation_comes_out_of_train(
    tmp_path: Path, tokenizer
) -> None:
    config = configure(write_folder(tmp_path, make_rows(20), make_rows(6, 100)))
    data = prepare_data(config, tokenizer, REWARDS)
    assert data.test == load_problems(str(tmp_path), "test")
    assert (data.test_name, data.test_split) == (str(tmp_path), "test")
    assert len(data.validation) == 4
    assert sorted(rows_of(data.train + data.validation)) == list(range(1, 21))
    assert_disjoint(data)
    assert data.notes == ()


def test_the_built_in_dataset_is_ready_as_it_is(tokenizer) -> None:
    config = configure("arithmetic", max_prompt_length=160, num_validation_items=128)
    data = prepare_data(config, tokenizer, REWARDS)
    assert (len(data.train), len(data.validation), len(data.test)) == (3872, 128, 512)
    assert data.notes == ()
    assert_disjoint(data)


def test_num_eval_items_takes_the_first_and_no_validation_is_allowed(
    tmp_path: Path, tokenizer
) -> None:
    dataset = write_folder(tmp_path, make_rows(8), make_rows(6, 100))
    config = configure(dataset, num_eval_items=2, num_validation_items=0)
    data = prepare_data(config, tokenizer, REWARDS)
    assert rows_of(data.test) == [1, 2]
    assert data.validation == [] and len(data.train) == 8


def test_an_eval_dataset_of_one_s_own(tmp_path: Path, tokenizer) -> None:
    train, other = write(tmp_path / "a.jsonl", make_rows(20)), make_rows(5, 50)
    config = configure(train, eval_dataset=write(tmp_path / "b.jsonl", other))
    data = prepare_data(config, tokenizer, REWARDS)
    assert [problem.question for problem in data.test] == [row["question"] for row in other]
    assert data.test_name == config.eval_dataset
    assert len(data.train) == 16


# Held out of a single file


def test_a_single_file_gives_a_tenth_to_the_test_the_same_for_a_seed(
    tmp_path: Path, tokenizer
) -> None:
    path = write(tmp_path / "a.jsonl", make_rows(60))
    first, again, other = (
        prepare_data(configure(path, seed=seed), tokenizer, REWARDS) for seed in (7, 7, 8)
    )
    assert first == again and first.sha256() == again.sha256()
    assert rows_of(first.test) != rows_of(other.test) and first.sha256() != other.sha256()
    assert rows_of(first.validation) != rows_of(other.validation)
    for data in (first, other):
        assert (len(data.train), len(data.validation), len(data.test)) == (50, 4, 6)
        assert_disjoint(data)
    assert first.test_split == "held out of train with seed 7"
    more = prepare_data(configure(path, num_eval_items=12), tokenizer, REWARDS)
    assert (len(more.train), len(more.test)) == (44, 12)


def test_repeats_of_a_question_are_held_out_together() -> None:
    problems = [
        Problem(row, f"Q{row % 5}  is?" if row > 4 else f"q{row} IS?", "1") for row in range(10)
    ]
    kept, held = hold_out(problems, 2, seed=0)
    assert len(held) == 4 and len(kept) == 6
    assert not questions_of(kept) & questions_of(held)


# What is dropped, with a sentence each


BAD_ROWS = [
    *make_rows(12),
    {"question": "Who?", "answer": "Ann"},
    *make_rows(3, 50),
    {"question": "How big?", "answer": "#### x + 1"},
]


def test_long_prompts_are_dropped_and_never_cut(tmp_path: Path, tokenizer) -> None:
    rows = make_rows(20)
    rows[4] = {"question": "long " * 200 + "?", "answer": "1"}
    dataset = write_folder(tmp_path, rows, make_rows(3, 80))
    config = configure(dataset, num_validation_items=0, max_prompt_length=5000)
    whole = prepare_data(config, tokenizer, REWARDS).train
    texts = [render(tokenizer, build_messages(problem.question)) for problem in whole]
    lengths = count_tokens(tokenizer, texts)
    assert max(lengths) == lengths[4] > 200
    limit = sorted(lengths)[-2]  # exactly as long as the longest of the others
    data = prepare_data(dataclasses.replace(config, max_prompt_length=limit), tokenizer, REWARDS)
    assert data.notes == (
        f"dropped from train: 1 of 20 prompts are longer than --max-prompt-length {limit} "
        f"(the longest has {max(lengths)}) (row 5)",
    )
    assert [problem.question for problem in data.train] == [
        row["question"] for number, row in enumerate(rows) if number != 4
    ]


MANY_BAD = [{"question": f"b{number}", "answer": "none"} for number in range(9)]
BLANK, LONG = {"question": "?"}, {"question": "long " * 999, "answer": "1"}
COPIES = [{"question": "  what is 3\nAND 1? ", "answer": "4"}, *make_rows(1, 7)]
TEST = make_rows(2, 90)


@pytest.mark.parametrize(
    ("train", "test", "why", "kept"),
    [
        (
            BAD_ROWS,
            TEST,
            "train: 2 of 17 gold answers .*'Ann'.*rows 13, 17",
            [*range(1, 13), 14, 15, 16],
        ),
        (MANY_BAD + make_rows(2), TEST, "9 of 11 .*rows 1, 2, 3, 4, 5 and 4 more", [10, 11]),
        (make_rows(3), [*TEST, *BAD_ROWS[-1:]], "test: 1 of 3 gold answers .*row 3", [1, 2, 3]),
        (
            make_rows(9),
            COPIES,
            "train: 2 of 9 questions are also in .*rows 4, 8",
            [1, 2, 3, 5, 6, 7, 9],
        ),
        ([*make_rows(3), BLANK], TEST, "train: 1 of 4 rows lack a question .*row 4", [1, 2, 3]),
        (
            [LONG, *make_rows(2)],
            TEST,
            "train: 1 of 3 prompts are longer than --max-prompt-length 512 .*row 1",
            [2, 3],
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_dropped_or_with_strict_data_refused(
    tmp_path: Path, tokenizer, train: list, test: list, why: str, kept: list[int]
) -> None:
    config = configure(write_folder(tmp_path, train, test), num_validation_items=0)
    data = prepare_data(config, tokenizer, REWARDS)
    [note] = data.notes
    assert re.search(f"dropped from .*{why}", note)
    assert rows_of(data.train) == kept and len(data.test) == 2
    assert_disjoint(data)
    with pytest.raises(ValueError, match=r"^--strict-data: "):
        prepare_data(dataclasses.replace(config, strict_data=True), tokenizer, REWARDS)


def test_a_reward_of_one_s_own_named_correctness_judges_the_gold_answers(
    tmp_path: Path, tokenizer
) -> None:
    """It is called with the columns that it gets in training."""
    file = tmp_path / "mine.py"
    file.write_text(
        "def correctness(completions, answer, question, prompts, **columns):\n"
        "    assert all(messages[-1]['content'] == q for messages, q in zip(prompts, question))\n"
        "    return [float('3' not in q) for q in question]\n"
    )
    rewards = build_rewards("none", (f"{file}:correctness",))
    [note] = prepare_data(
        configure(write(tmp_path / "a.jsonl", make_rows(20))), tokenizer, rewards
    ).notes
    assert note.startswith("dropped from train: 2 of 20") and "(rows 4, 14)" in note


# One shot, the system prompt


def test_the_example_stands_in_the_prompts_and_is_not_trained_on(tmp_path: Path, tokenizer) -> None:
    rows = [
        {"question": "unworked", "answer": "1"},
        *make_rows(20),
        {"question": "what is 0  and 1?", "answer": "1"},
    ]
    dataset = write_folder(tmp_path, rows, make_rows(3, 90))
    data = prepare_data(configure(dataset, one_shot=True), tokenizer, REWARDS)
    assert data.style.example == Problem(2, "What is 0 and 1?", "1", "0+1")
    everywhere = questions_of(data.train + data.validation + data.test)
    assert normalise("What is 0 and 1?") not in everywhere
    assert len(data.train + data.validation) == 20
    contents = [message["content"] for message in build_messages("Why?", data.style)]
    assert contents[0] == NUMBER_TASK.system_prompt and contents[1] == "What is 0 and 1?"
    assert contents[2].endswith("<answer>\n1\n</answer>") and contents[3] == "Why?"
    plain = prepare_data(configure(dataset), tokenizer, REWARDS)
    assert plain.style.example is None and len(plain.train + plain.validation) == 22


def test_the_example_counts_towards_the_prompt_s_length(tmp_path: Path, tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", make_rows(40))
    [alone] = count_tokens(tokenizer, [render(tokenizer, build_messages("What is 11 and 1?"))])
    config = configure(path, max_prompt_length=alone)
    assert prepare_data(config, tokenizer, REWARDS).notes == ()
    with pytest.raises(ValueError, match=r"prompts are longer than .*: no usable rows are left"):
        prepare_data(dataclasses.replace(config, one_shot=True), tokenizer, REWARDS)


def test_without_worked_solutions_the_example_shows_its_answer_alone(
    tmp_path: Path, tokenizer
) -> None:
    rows = [{"question": f"q{number}", "answer": "1"} for number in range(20)]
    data = prepare_data(
        configure(write(tmp_path / "a.jsonl", rows), one_shot=True), tokenizer, REWARDS
    )
    example = build_messages("Why?", data.style)[2]["content"]
    assert NUMBER_TASK.parse_reasoning(example) == NUMBER_TASK.parse(example) == "1"
    assert any("--one-shot" in note and "worked solution" in note for note in data.notes)


def test_a_system_prompt_file_replaces_the_built_in_one(tmp_path: Path, tokenizer) -> None:
    file = tmp_path / "prompt.txt"
    path = write(tmp_path / "a.jsonl", make_rows(20))
    config = configure(path, system_prompt_file=file)
    with pytest.raises(FileNotFoundError, match=r"prompt\.txt does not exist"):
        prepare_data(config, tokenizer, REWARDS)
    file.write_text("  ")
    with pytest.raises(ValueError, match=r"prompt\.txt is blank"):
        prepare_data(config, tokenizer, REWARDS)
    file.write_text(OWN_PROMPT)
    data = prepare_data(config, tokenizer, REWARDS)
    assert data.style.system_prompt == OWN_PROMPT and data.notes == ()


OWN_PROMPT = "Think in <reasoning>...</reasoning>, then answer in <answer>...</answer>."
ANSWER_ALONE = "Think step by step. Put the final number in <answer></answer>."


@pytest.mark.parametrize(
    ("prompt", "settings", "unpaid"),
    [
        ("Answer in <final>...</final>.", {}, "correctness, format"),
        ("Think.", {}, "correctness, format"),
        ("Think in <think>...</think>, answer in <answer>...</answer>.", {}, "format"),
        ("Answer in <final>...</final>.", {"one_shot": True}, "correctness, format"),
        ("Think.", {"reward_set": "classic"}, "correctness, integer, soft_format"),
    ],
)
def test_a_system_prompt_whose_tags_are_not_paid_is_refused(
    tmp_path: Path, tokenizer, prompt: str, settings: dict, unpaid: str
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(prompt)
    path = write(tmp_path / "a.jsonl", make_rows(20))
    config = configure(path, system_prompt_file=file, **settings)
    rewards = build_rewards(config.reward_set)
    with pytest.raises(ValueError, match=f"--system-prompt-file {file} .* {unpaid}.*<answer>"):
        prepare_data(config, tokenizer, rewards)
    resumed = dataclasses.replace(config, resume=tmp_path)
    assert prepare_data(resumed, tokenizer, rewards).style.system_prompt == prompt


def test_a_system_prompt_without_tags_is_free_where_it_can_be_paid(
    tmp_path: Path, tokenizer
) -> None:
    file = tmp_path / "prompt.txt"
    path = write(tmp_path / "a.jsonl", make_rows(20))
    (tmp_path / "mine.py").write_text("def mine(completions, **columns): return [0.0]")
    own = build_rewards("none", (f"{tmp_path}/mine.py:mine",))

    def notes(prompt: str, rewards: list, **settings) -> str:
        file.write_text(prompt)
        config = configure(path, system_prompt_file=file, **settings)
        return " ".join(prepare_data(config, tokenizer, rewards).notes)

    assert "format" in notes(ANSWER_ALONE, REWARDS)
    assert notes(ANSWER_ALONE, build_rewards(weights={"format": 0.0})) == ""
    assert notes("Think.", REWARDS, one_shot=True) == ""
    assert "strict accuracy" in notes("Answer in <final>...</final>.", own)


# Too little


@pytest.mark.parametrize("one_shot", [False, True])
def test_holding_everything_out_leaves_nothing_to_train_on(
    tmp_path: Path, tokenizer, one_shot: bool
) -> None:
    path = write(tmp_path / "a.jsonl", make_rows(20))
    with pytest.raises(ValueError, match="leaves no problems to train on"):
        prepare_data(configure(path, num_eval_items=20, one_shot=one_shot), tokenizer, REWARDS)
    with pytest.raises(ValueError, match=r"leaves no problems.*lower.*18 kept to choose"):
        prepare_data(configure(path, num_validation_items=18), tokenizer, REWARDS)


def test_a_file_as_its_own_test_leaves_nothing_to_train_on(tmp_path: Path, tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", make_rows(9))
    with pytest.raises(ValueError, match=r"9 of 9 questions are also in the test set .* no usable"):
        prepare_data(configure(path, eval_dataset=path), tokenizer, REWARDS)


def test_errors_in_the_eval_dataset_name_its_flag(tmp_path: Path, tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", make_rows(9))
    config = configure(path, eval_dataset=str(tmp_path / "gone.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"^--eval-dataset .*gone\.jsonl does not exist"):
        prepare_data(config, tokenizer, REWARDS)


# Data of one's own: sizes, and golds that no reward can pay


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [(8, (7, 0, 1)), (40, (33, 3, 4)), (120, (98, 10, 12)), (4000, (3440, 160, 400))],
)
def test_a_file_of_any_size_trains_on_the_toy_preset_without_more_flags(
    tmp_path: Path, tokenizer, rows: int, sizes: tuple[int, int, int]
) -> None:
    path = write(tmp_path / "a.jsonl", make_rows(rows))
    config, _ = parse_train_config(["--preset", "tiny", "--dataset", path])
    assert config.max_prompt_length == TrainConfig.max_prompt_length > 160
    data = prepare_data(config, tokenizer, REWARDS)
    assert (len(data.train), len(data.validation), len(data.test)) == sizes
    assert data.num_validation_items == sizes[1]
    again = dataclasses.replace(config, num_validation_items=data.num_validation_items)
    assert prepare_data(again, tokenizer, REWARDS).sha256() == data.sha256()
    small = len(data.train) < config.prompts_per_step
    assert ["16 prompts of 7 problems" in note for note in data.notes] == ([True] if small else [])


def test_the_limits_of_a_preset_are_those_of_its_own_problems(tmp_path: Path) -> None:
    own, _ = parse_train_config(["--preset", "tiny"])
    assert (own.max_prompt_length, own.num_validation_items) == (160, 256)
    asked = ["--preset", "tiny", "--dataset", str(tmp_path), "--max-prompt-length", "99"]
    config, _ = parse_train_config(asked)
    assert (config.max_prompt_length, config.num_validation_items) == (99, None)


def test_validation_grows_with_what_is_sampled_and_has_bounds() -> None:
    def count(problems: int, **settings: int) -> int:
        return count_validation_items(TrainConfig(**settings), problems)

    assert count(7000) == 200  # an eighth of 25 steps of 64 completions
    assert (count(7000, eval_steps=1), count(7000, eval_steps=100)) == (64, 256)
    assert (count(300), count(9), count(9, num_validation_items=5)) == (30, 0, 5)


def test_fewer_test_problems_than_were_asked_for_are_said(tmp_path: Path, tokenizer) -> None:
    dataset = write_folder(tmp_path, make_rows(20), make_rows(3, 50))
    [note] = prepare_data(configure(dataset, num_eval_items=9), tokenizer, REWARDS).notes
    assert "--num-eval-items 9" in note and "only 3" in note


def test_a_tenth_is_of_the_questions_and_not_of_their_repeats(tmp_path: Path, tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", make_rows(40) * 30)
    data = prepare_data(configure(path, num_validation_items=None), tokenizer, REWARDS)
    parts = (data.train, data.validation, data.test)
    assert [len(questions_of(part)) for part in parts] == [33, 3, 4]
    assert len(set().union(*map(questions_of, parts))) == 40


@pytest.mark.parametrize(
    ("answers", "what"), [(["A", "B", "C", "B"], r"choices \(A, B, C\)"), (["Rome"] * 4, "words")]
)
def test_golds_that_no_reward_can_pay_are_shown_and_explained(
    tmp_path: Path, tokenizer, answers: list[str], what: str
) -> None:
    rows = [{"question": f"q{n}", "answer": answer} for n, answer in enumerate(answers)]
    config = configure(write(tmp_path / "a.jsonl", rows))
    with pytest.raises(
        ValueError, match=rf"--dataset .*a\.jsonl: .*{what}.*row 1: .*row 3: .*--answer-column"
    ) as caught:
        prepare_data(config, tokenizer, REWARDS)
    assert "--reward-set none" in str(caught.value) and "row 4" not in str(caught.value)


def test_decimal_commas_of_train_are_those_of_test(tmp_path: Path, tokenizer) -> None:
    train = [{"question": f"q{n}", "answer": f"{n},5"} for n in range(20)]
    dataset = write_folder(tmp_path, train, [{"question": "t", "answer": "1,500"}])
    data = prepare_data(configure(dataset), tokenizer, REWARDS)
    assert data.decimal_separator == "comma" and data.test[0].answer == "1.500"
    assert {problem.answer for problem in data.train} <= {f"{n}.5" for n in range(20)}


def test_evaluation_drops_and_counts_what_training_would(tmp_path: Path) -> None:
    rows = [
        *make_rows(5),
        {"question": "Who?", "answer": "It was Ann who came, not I."},
        {"question": "blank"},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    problems, _, _, notes, _ = held_out_problems(
        EvaluateConfig(model="tiny", dataset=path), read_record(tmp_path)
    )
    assert [problem.row for problem in problems] == [1, 2, 3, 4, 5]
    assert "1 of 7 rows lack" in notes[0] and "1 of 6 gold answers" in notes[1]
    path = write(tmp_path / "b.jsonl", rows[5:])
    with pytest.raises(ValueError, match="none of the 1 gold answers"):
        held_out_problems(EvaluateConfig(model="tiny", dataset=path), read_record(tmp_path))
