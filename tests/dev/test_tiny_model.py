"""The embedded model: small, ordinary, its tokenizer the same when it is loaded again."""

from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from lora_grpo.data.arithmetic import TEMPLATES, generate_problems
from lora_grpo.dev.tiny_model import STYLES, train_tokenizer, write_completion
from lora_grpo.policy.base import EMBEDDED_FOLDER


def test_it_is_small_and_whole() -> None:
    names = {path.name for path in EMBEDDED_FOLDER.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md"} <= names
    assert sum(path.stat().st_size for path in EMBEDDED_FOLDER.glob("*.safetensors")) <= 8 << 20


def test_reloaded_tokenizer_gives_the_ids_it_was_trained_with() -> None:
    raw = Tokenizer.from_file(str(EMBEDDED_FOLDER / "tokenizer.json"))
    loaded = AutoTokenizer.from_pretrained(EMBEDDED_FOLDER)
    texts = [row["question"] + "\n" + row["answer"] for row in generate_problems(200)]
    for text in [*texts, "<reasoning>\n12*3=36\n</reasoning>\n<answer>\n36\n</answer><|im_end|>"]:
        assert loaded(text)["input_ids"] == raw.encode(text).ids


def test_tokenizer_is_rebuilt_from_its_seed(tmp_path: Path) -> None:
    again = train_tokenizer(0)
    shipped = AutoTokenizer.from_pretrained(EMBEDDED_FOLDER)
    assert again.get_vocab() == shipped.get_vocab()
    text = generate_problems(1)[0]["question"]
    assert again(text)["input_ids"] == shipped(text)["input_ids"]


def test_digits_are_split_and_a_turn_ends_with_its_own_token() -> None:
    loaded = AutoTokenizer.from_pretrained(EMBEDDED_FOLDER)
    assert loaded.tokenize("12345") == ["1", "2", "3", "4", "5"]
    assert loaded.eos_token == "<|im_end|>" and loaded.pad_token_id != loaded.eos_token_id


def test_styles_are_drawn_by_their_shares() -> None:
    import random

    draw, problem = random.Random(0), generate_problems(1)[0]
    written = [write_completion(problem, draw) for _ in range(4000)]
    full = sum(text.startswith("<reasoning>") for text in written) / len(written)
    assert abs(full - STYLES["the full format"][0]) < 0.03
    assert abs(sum(share for share, _ in STYLES.values()) - 1) < 1e-9
    assert len(TEMPLATES) >= 6
